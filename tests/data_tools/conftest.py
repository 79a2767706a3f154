from tests.data.conftest import inputs, tokenizer

__all__ = ["inputs", "tokenizer"]
