"""BERT and its heads: the same outputs and gradients per text as transformers', texts of mixed length in one batch."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig as TheirConfig
from transformers import BertForMaskedLM, BertModel

from mmpt.batch import pack
from mmpt.models.bert import SIZES, BertConfig, BertEmbedding, BertEmbeddingConfig, bert
from mmpt.models.heads import MaskedWordHead, Pooler, tie
from mmpt.models.transformer import TransformerConfig
from tests.models.weights import below, bert_weights, masked_word_weights, shake

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
VOCABULARY, WIDTH, DEPTH, POSITIONS = 60, 32, 4, 20
TRUNK = TransformerConfig(WIDTH, DEPTH, 4, norm="post", norm_eps=1e-12, dropout=0.1, attention_dropout=0.1, init="bert")
CONFIG = BertConfig(BertEmbeddingConfig(WIDTH, VOCABULARY, POSITIONS), TRUNK, max_tokens=18)
THEIRS = TheirConfig(
    vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=4,
    intermediate_size=4 * WIDTH, max_position_embeddings=POSITIONS,
)  # fmt: skip
LENGTHS = (3, 18, 1, 7, 7)


def texts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, VOCABULARY, (n,), generator=generator) for n in LENGTHS]


def padded(sequences: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows filled up with zeros, and the mask of what is not."""
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    return ids, torch.arange(ids.shape[1]) < torch.tensor(LENGTHS)[:, None]


class Masked(nn.Module):
    """Ours, as a method would put them together."""

    def __init__(self) -> None:
        super().__init__()
        self.text = CONFIG.build()
        self.words = MaskedWordHead(WIDTH, VOCABULARY, tied=self.text.embedding.token_embedding)


def pair() -> tuple[BertForMaskedLM, Masked]:
    torch.manual_seed(0)
    theirs, ours = BertForMaskedLM(THEIRS).eval(), Masked().eval()
    shake(theirs)
    state = theirs.state_dict()
    ours.text.load_state_dict(bert_weights(below(state, "bert."), ours.text))
    ours.words.load_state_dict(masked_word_weights(below(state, "cls.predictions."), ours.words))
    return theirs, ours


@torch.no_grad()
def test_bert_and_pooler() -> None:
    torch.manual_seed(0)
    theirs, ours, pooler = BertModel(THEIRS).eval(), CONFIG.build().eval(), Pooler(WIDTH)
    shake(theirs)
    state = theirs.state_dict()
    ours.load_state_dict(bert_weights(state, ours))
    pooler.load_state_dict(below(state, "pooler."))
    ids, mask = padded(texts())
    expected = theirs(input_ids=ids, attention_mask=mask)
    found = ours(pack(texts()))
    torch.testing.assert_close(found.x, expected.last_hidden_state[mask], **TOLERANCE)
    torch.testing.assert_close(ours.summary(found), expected.last_hidden_state[:, 0], **TOLERANCE)
    torch.testing.assert_close(pooler(ours.summary(found)), expected.pooler_output, **TOLERANCE)


@torch.no_grad()
def test_embedding_alone_with_types() -> None:
    torch.manual_seed(0)
    theirs, ours = BertModel(THEIRS).eval(), CONFIG.build().eval()
    shake(theirs)
    ours.load_state_dict(bert_weights(theirs.state_dict(), ours))
    ids, mask = padded(texts())
    types = (torch.arange(ids.shape[1]) % 2).expand_as(ids)
    expected = theirs.embeddings(input_ids=ids, token_type_ids=types)[mask]
    torch.testing.assert_close(ours.embedding(pack(texts()), types[mask]).x, expected, **TOLERANCE)
    assert not torch.allclose(ours.embedding(pack(texts())).x, expected, atol=1e-2)


def test_masked_words_and_their_gradients() -> None:
    """The decoder is the token embedding: both of its uses add to one gradient."""
    theirs, ours = pair()
    ids, mask = padded(texts())
    chosen = torch.rand(int(mask.sum()), generator=torch.Generator().manual_seed(2)) < 0.3
    labels = ids[mask][chosen]
    expected = theirs(input_ids=ids, attention_mask=mask).logits[mask][chosen]
    found = ours.words(ours.text(pack(texts())).x[chosen])
    torch.testing.assert_close(found, expected, **TOLERANCE)
    for logits in (found, expected):
        nn.functional.cross_entropy(logits, labels).backward()
    theirs_grads = {name: p.grad for name, p in theirs.named_parameters()}
    wanted = bert_weights(below(theirs_grads, "bert."), ours.text)  # type: ignore[arg-type]
    for name, parameter in ours.text.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], **TOLERANCE)
    wanted = masked_word_weights(below(theirs_grads, "cls.predictions."), ours.words)  # type: ignore[arg-type]
    for name in wanted:
        torch.testing.assert_close(ours.words.get_parameter(name).grad, wanted[name], **TOLERANCE)


def test_a_tied_decoder_is_kept_once() -> None:
    ours = pair()[1]
    names = [name for name, _ in ours.named_parameters()]
    assert "text.embedding.token_embedding" in names and "words.decoder" not in names
    assert ours.state_dict().keys() == set(names)
    other = Masked()
    other.load_state_dict(ours.state_dict())
    assert other.words.decoder is other.text.embedding.token_embedding
    torch.testing.assert_close(other.words.decoder, ours.words.decoder, rtol=0, atol=0)
    own = MaskedWordHead(WIDTH, VOCABULARY)
    assert "decoder" in own.state_dict() and own.decoder.std().item() == pytest.approx(0.02, rel=0.1)
    with pytest.raises(ValueError, match=r"a decoder is \[60, 32\], what it is tied to is \[20, 32\]"):
        MaskedWordHead(WIDTH, VOCABULARY, tied=ours.text.embedding.position_embedding)
    holder = nn.Module()
    tie(holder, "weight", own.decoder)
    assert holder.get_parameter("weight") is own.decoder and not holder.state_dict()


@pytest.mark.parametrize(("size", "expected"), [("base", 109_482_240), ("large", 335_141_888)])
def test_published_sizes(size: str, expected: int) -> None:
    """bert-base-uncased and bert-large-uncased, poolers included; the small ones are those of Turc et al. 2019."""
    config = bert(size)  # type: ignore[arg-type]
    width, depth = SIZES[size]
    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    with torch.device("meta"):
        modules = config.build(), Pooler(width)
        theirs = BertModel(TheirConfig(**(large if size == "large" else {})))
    assert sum(p.numel() for module in modules for p in module.parameters()) == expected == theirs.num_parameters()
    assert (config.trunk.depth, config.trunk.heads) == (depth, theirs.config.num_attention_heads)


def test_initial_weights() -> None:
    torch.manual_seed(0)
    model = bert("tiny", vocab_size=500).build()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "type_embedding" not in name:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
            assert abs(parameter.mean().item()) < 1e-3, name
    assert not model.trunk.blocks[0].get_parameter("qkv.bias").any()


def test_dropout_in_training_only() -> None:
    torch.manual_seed(0)
    alone = BertEmbedding(CONFIG.embedding)
    ids = pack(texts())
    assert (alone(ids).x == 0).float().mean().item() == pytest.approx(0.1, abs=0.05)
    assert torch.equal(alone.eval()(ids).x, alone(ids).x)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="a text has 21 tokens, the model has 20 positions"):
        CONFIG.build()(pack([torch.ones(21, dtype=torch.int64)]))
    with pytest.raises(ValueError, match="the embedding is 32 wide, the blocks are 16 wide"):
        replace(CONFIG, trunk=replace(TRUNK, width=16))
    with pytest.raises(ValueError, match="captions of 21 tokens do not fit 20 positions"):
        replace(CONFIG, max_tokens=21)
    with pytest.raises(ValueError, match="not 'pre'"):
        replace(CONFIG, trunk=replace(TRUNK, norm="pre"))
