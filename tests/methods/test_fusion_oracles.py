"""ViLT, UNITER and ALBEF against transformers' classes with the same random weights, for texts of mixed length.

What has no class there (regions, the losses) is written out here in plain, padded torch.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, kl_div, layer_norm, log_softmax, normalize
from transformers import BertConfig as TheirBertConfig
from transformers import BertModel, ViltConfig, ViltModel
from transformers.models.blip.configuration_blip import BlipTextConfig
from transformers.models.blip.modeling_blip_text import BlipTextModel

from mmpt.batch import Batch, Pictures, Tokens, pack, unpack
from mmpt.methods.albef import ALBEF
from mmpt.methods.method import Method, loss_of
from mmpt.methods.uniter import UNITER
from mmpt.methods.vilt import ViLT
from mmpt.objectives.transport import transport_distance
from tests.methods.tiny import MAX_TOKENS, VOCABULARY, batch, build
from tests.models.weights import below

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
PAIRS = 6


VIT_PLACES = {
    "attention.output.dense": "out", "intermediate.dense": "mlp_in", "output.dense": "mlp_out",
    "layernorm_before": "norm_1", "layernorm_after": "norm_2",
}  # fmt: skip


def bert_state(state: dict[str, Tensor], ours: str, theirs: str, depth: int) -> dict[str, Tensor]:
    """Blocks `ours.N` under the names of BERT's layers `theirs.N`."""
    out = {}
    places = {"out": "attention.output.dense", "norm_1": "attention.output.LayerNorm", "mlp_in": "intermediate.dense",
              "mlp_out": "output.dense", "norm_2": "output.LayerNorm", "cross_q": "crossattention.self.query",
              "cross_out": "crossattention.output.dense", "norm_cross": "crossattention.output.LayerNorm"}  # fmt: skip
    for i in range(depth):
        for kind in ("weight", "bias"):
            for a, b in places.items():
                if f"{ours}.{i}.{a}.{kind}" in state:
                    out[f"{theirs}.{i}.{b}.{kind}"] = state[f"{ours}.{i}.{a}.{kind}"]
            stacked = {
                "qkv": ("attention.self", ("query", "key", "value")),
                "cross_kv": ("crossattention.self", ("key", "value")),
            }
            for a, (b, names) in stacked.items():
                if f"{ours}.{i}.{a}.{kind}" in state:
                    parts = state[f"{ours}.{i}.{a}.{kind}"].chunk(len(names))
                    out |= {f"{theirs}.{i}.{b}.{name}.{kind}": part for name, part in zip(names, parts, strict=True)}
    return out


def embedding_state(state: dict[str, Tensor], theirs: str) -> dict[str, Tensor]:
    tables = {"token": "word", "position": "position", "type": "token_type"}
    out = {f"{theirs}{b}_embeddings.weight": state[f"{a}_embedding"] for a, b in tables.items()}
    return out | {f"{theirs}LayerNorm.{kind}": state[f"norm.{kind}"] for kind in ("weight", "bias")}


def load(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Every weight of theirs is one of ours; buffers may stay."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and not set(missing) & set(dict(model.named_parameters())), (missing, unexpected)
    return model.eval()


def padded(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """[B, L, ...] and the attention mask [B, L]."""
    parts = unpack(tokens)
    x = nn.utils.rnn.pad_sequence(parts, batch_first=True)
    return x, nn.utils.rnn.pad_sequence([torch.ones(len(p), dtype=torch.int64) for p in parts], batch_first=True)


def flat(x: Tensor, mask: Tensor) -> Tensor:
    return x[mask.bool()]


def parts(name: str) -> tuple[Method, Batch, dict[str, Tensor]]:
    method, data = build(name).eval(), batch(name, PAIRS, 0, PAIRS)
    return method, data, {key: value.detach() for key, value in method.state_dict().items()}


@torch.no_grad()
def test_vilt_trunk_is_transformers_for_square_images() -> None:
    method, _, state = parts("vilt")
    assert isinstance(method, ViLT)
    config = ViltConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=16, patch_size=4, max_position_embeddings=MAX_TOKENS, layer_norm_eps=1e-5, max_image_length=-1,
    )  # fmt: skip
    theirs = ViltModel(config)
    theirs.embeddings.text_embeddings.LayerNorm.eps = 1e-12
    vit = {f"encoder.layer.{i}": f"trunk.blocks.{i}" for i in range(2)}
    mapped = embedding_state(below(state, "text."), "embeddings.text_embeddings.")
    mapped["embeddings.token_type_embeddings.weight"] = state["modality.embedding"]
    mapped["embeddings.cls_token"] = state["image.class_embedding"].view(1, 1, -1)
    mapped["embeddings.position_embeddings"] = state["image.position_embedding"][None]
    mapped["embeddings.patch_embeddings.projection.weight"] = state["image.patch.weight"].view(16, 3, 4, 4)
    mapped["embeddings.patch_embeddings.projection.bias"] = state["image.patch.bias"]
    for a, b in vit.items():
        for kind in ("weight", "bias"):
            for name, piece in zip(("query", "key", "value"), state[f"{b}.qkv.{kind}"].chunk(3), strict=True):
                mapped[f"{a}.attention.attention.{name}.{kind}"] = piece
            for theirs_name, ours_name in VIT_PLACES.items():
                mapped[f"{a}.{theirs_name}.{kind}"] = state[f"{b}.{ours_name}.{kind}"]
    for kind in ("weight", "bias"):
        mapped[f"layernorm.{kind}"] = state[f"norm.{kind}"]
        mapped[f"pooler.dense.{kind}"] = state[f"pooler.dense.{kind}"]
    load(theirs, mapped)

    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (PAIRS, 3, 16, 16), dtype=torch.uint8, generator=generator)
    data = batch("clip", PAIRS, 0, PAIRS, seed=3)
    pixels = (images / 255 - torch.tensor(method.config.image.mean)[:, None, None]) / torch.tensor(
        method.config.image.std
    )[:, None, None]
    ids, mask = padded(data.text)
    out = theirs(input_ids=ids, attention_mask=mask, pixel_values=pixels, pixel_mask=torch.ones(PAIRS, 16, 16).long())
    fused = method.fuse(method.encode_text(data.text), method.encode_image(Pictures(images)))
    words = fused.tokens.x[fused.first_rows]
    torch.testing.assert_close(words, flat(out.last_hidden_state[:, : ids.shape[1]], mask), **CLOSE)
    pooled = method.pooler(torch.stack([part[0] for part in unpack(fused.tokens)]))
    torch.testing.assert_close(pooled, out.pooler_output, **CLOSE)


@torch.no_grad()
def test_uniter_is_a_bert_encoder_over_words_and_regions() -> None:
    method, data, state = parts("uniter mlm")
    assert isinstance(method, UNITER) and data.pictures.regions is not None
    config = TheirBertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=MAX_TOKENS, layer_norm_eps=1e-5, attn_implementation="eager",
    )  # fmt: skip
    theirs = BertModel(config, add_pooling_layer=False)
    mapped = embedding_state(below(state, "text."), "embeddings.")
    load(theirs, mapped | bert_state(state, "trunk.blocks", "encoder.layer", 2))
    theirs.embeddings.LayerNorm.eps = 1e-12
    ids, mask = padded(data.text)
    words = theirs.embeddings(input_ids=ids)
    regions = data.pictures.regions

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"image.{name}.weight"].T + state[f"image.{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        return layer_norm(x, (16,), state[f"image.{name}.weight"], state[f"image.{name}.bias"], 1e-12)

    found = norm(linear(regions.features.x, "feature"), "feature_norm")
    found = found + norm(linear(regions.boxes, "location"), "location_norm") + state["text.type_embedding"][1]
    places, place_mask = padded(regions.features.with_x(norm(found, "norm")))
    both = torch.cat([mask, place_mask], 1)
    bias = torch.where(both.bool(), 0.0, -torch.inf)[:, None, None, :]
    out = theirs.encoder(torch.cat([words, places], 1), attention_mask=bias).last_hidden_state
    fused = method.fuse(method.encode_text(data.text), method.encode_image(data.pictures))
    torch.testing.assert_close(fused.tokens.x[fused.first_rows], flat(out[:, : ids.shape[1]], mask), **CLOSE)
    torch.testing.assert_close(fused.tokens.x[fused.second_rows], flat(out[:, ids.shape[1] :], place_mask), **CLOSE)


def head(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    x = gelu(x @ state[f"{name}.transform.dense.weight"].T + state[f"{name}.transform.dense.bias"])
    norm = state[f"{name}.transform.norm.weight"], state[f"{name}.transform.norm.bias"]
    return layer_norm(x, (x.shape[1],), *norm, 1e-12)


@pytest.mark.parametrize("task", ["mlm", "mrfr", "mrc", "mrckl", "itm"])
def test_uniter_heads_are_the_published_ones(task: str) -> None:
    """Tied weights, masked vectors in place of features, means over all numbers; distances with [CLS] and [SEP]."""
    method, data, state = parts(f"uniter {task}")
    assert isinstance(method, UNITER) and data.pictures.regions is not None
    assert data.masked_words is not None and data.masked_regions is not None and data.partners is not None
    terms = method("terms", data)
    if task == "itm":
        text, image = method.encode_text(data.text), method.encode_image(data.partners.pictures)
        fused = method.fuse(text, image)
        words = unpack(text.with_x(fused.tokens.x[fused.first_rows]))
        places = unpack(image.with_x(fused.tokens.x[fused.second_rows]))
        real = [torch.ones(1, len(x), dtype=torch.bool) for x in (*words, *places)]
        distances = [
            transport_distance(a[None], b[None], real[i], real[PAIRS + i])
            for i, (a, b) in enumerate(zip(words, places, strict=True))
        ]
        signs = data.partners.matches.float() * 2 - 1
        expected = (torch.cat(distances) * signs).sum()
        torch.testing.assert_close(terms["alignment"].sum, expected, rtol=1e-4, atol=1e-4)
        assert terms["alignment"].weight == 0.1
        return
    ids, masked = data.text, data.masked_regions.chosen
    pictures, regions = data.pictures, data.pictures.regions
    if task == "mlm":
        fused = method.fuse(method.encode_text(ids.with_x(data.masked_words.ids)), method.encode_image(pictures))
        states = fused.tokens.x[fused.first_rows][data.masked_words.chosen]
        logits = head(states, state, "word_head") @ state["text.token_embedding"].T + state["word_head.bias"]
        expected = cross_entropy(logits, ids.x[data.masked_words.chosen], reduction="sum")
        torch.testing.assert_close(terms["words"].sum, expected, rtol=1e-4, atol=1e-4)
        return
    hidden = regions.features.x.masked_fill(masked[:, None], 0) + masked[:, None] * state["image.mask"]
    shown = Pictures(regions=regions._replace(features=regions.features.with_x(hidden)))
    fused = method.fuse(method.encode_text(ids), method.encode_image(shown))
    states = fused.tokens.x[fused.second_rows][masked]
    if task == "mrfr":
        guesses = head(states, state, "feature_head") @ state["image.feature.weight"] + state["feature_head.bias"]
        expected = (guesses - regions.features.x[masked]).square().mean() * len(guesses)
    else:
        logits = head(states, state, "class_head") @ state["class_head.classes.weight"].T
        logits, found = logits + state["class_head.classes.bias"], regions.classes[masked]
        if task == "mrc":
            expected = cross_entropy(logits, found[:, 1:].argmax(1) + 1, reduction="sum")
        else:
            expected = kl_div(log_softmax(logits, 1), found, reduction="none").mean() * len(logits)
    (term,) = terms.values()
    torch.testing.assert_close(term.sum, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_albef_text_and_fusion_are_bert_and_blip() -> None:
    method, data, state = parts("albef local")
    assert isinstance(method, ALBEF)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    lower = BertModel(
        TheirBertConfig(vocab_size=VOCABULARY, max_position_embeddings=MAX_TOKENS, layer_norm_eps=1e-5, **shape),
        add_pooling_layer=False,
    )
    own = below(state, "encoders.")
    text_state = embedding_state(below(own, "text.embedding."), "embeddings.")
    load(lower, text_state | bert_state(below(own, "text."), "trunk.blocks", "encoder.layer", 2))
    lower.embeddings.LayerNorm.eps = 1e-12
    upper = BlipTextModel(
        BlipTextConfig(
            vocab_size=VOCABULARY, encoder_hidden_size=16, is_decoder=True, layer_norm_eps=1e-5,
            hidden_act="gelu", **shape,
        ),
        add_pooling_layer=False,
    )  # fmt: skip
    mapped = bert_state(below(own, "fusion."), "blocks", "encoder.layer", 2)
    missing, unexpected = upper.load_state_dict(mapped, strict=False)
    assert not unexpected and all(name.startswith("embeddings.") for name in missing)
    ids, mask = padded(data.text)
    states = lower(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(method.encode_text(data.text).x, flat(states, mask), **CLOSE)
    image = method.encode_image(data.pictures)
    seen = torch.stack(unpack(image))
    out = upper.eval()(
        encoder_embeds=states, attention_mask=mask, encoder_hidden_states=seen,
        encoder_attention_mask=torch.ones(seen.shape[:2]), is_decoder=False,
    ).last_hidden_state  # fmt: skip
    torch.testing.assert_close(method.encoders.fusion(method.encode_text(data.text), image).x, flat(out, mask), **CLOSE)


@torch.no_grad()
def test_albef_terms_are_the_published_ones() -> None:
    """Queue after the batch, targets between the copy's softmax and one-hot, 3 B pairs, soft answers for words."""
    method, data, _ = parts("albef local")
    assert isinstance(method, ALBEF) and data.masked_words is not None and data.draws is not None
    terms, encoders = method("terms", data), method.encoders
    alpha, temperature = 0.4 * 0.5, 0.07
    copy = method.teacher
    assert copy is not None
    image, text = encoders.image(data.pictures), encoders.text(data.text)
    sides = [encoders.image_vector(image), encoders.text_vector(text)]
    image_m = copy.image(data.pictures)  # type: ignore[operator]
    copies = [copy.image_vector(image_m), copy.text_vector(copy.text(data.text))]  # type: ignore[operator]
    queues = [method.image_queue, method.text_queue]
    every = [torch.cat([a, b]).T for a, b in zip(copies, queues, strict=True)]  # type: ignore[list-item]
    own = torch.zeros(PAIRS, every[0].shape[1])
    own.fill_diagonal_(1)
    losses, similarities = [], []
    for side, other in ((0, 1), (1, 0)):
        soft = (copies[side] @ every[other] / temperature).softmax(1)
        similarities.append(sides[side] @ every[other] / temperature)
        losses.append(-(log_softmax(similarities[-1], 1) * (alpha * soft + (1 - alpha) * own)).sum())
    torch.testing.assert_close(terms["contrastive"].sum, sum(losses) / 2, rtol=1e-4, atol=1e-4)

    def drawn(logits: Tensor, draws: Tensor) -> list[int]:
        weights = logits[:, :PAIRS].double().masked_fill(torch.eye(PAIRS, dtype=torch.bool), -torch.inf).softmax(1)
        return [int((row.cumsum(0) <= u).sum()) for row, u in zip(weights, draws, strict=True)]

    images, texts = unpack(image), unpack(text)
    hard_image, hard_text = drawn(similarities[1], data.draws[:, 0]), drawn(similarities[0], data.draws[:, 1])
    pairs = list(zip(texts, images, strict=True))
    pairs += [(texts[i], images[j]) for i, j in enumerate(hard_image)]
    pairs += [(texts[j], images[i]) for i, j in enumerate(hard_text)]
    firsts = torch.stack([encoders.fusion(pack([t]), pack([v])).x[0] for t, v in pairs])
    labels = torch.cat([torch.ones(PAIRS), torch.zeros(2 * PAIRS)]).long()
    expected = cross_entropy(method.match_head(firsts), labels, reduction="sum")
    torch.testing.assert_close(terms["matching"].sum, expected, rtol=1e-4, atol=1e-4)
    assert terms["matching"].count == 3 * PAIRS

    masked, chosen = data.text.with_x(data.masked_words.ids), data.masked_words.chosen
    logits = encoders.word_head(encoders.fusion(encoders.text(masked), image).x[chosen])
    soft = copy.word_head(copy.fusion(copy.text(masked), image_m).x[chosen]).softmax(1)  # type: ignore[operator]
    hard = cross_entropy(logits, data.text.x[chosen], reduction="sum")
    distilled = -(log_softmax(logits, 1) * soft).sum()
    torch.testing.assert_close(terms["words"].sum, (1 - alpha) * hard + alpha * distilled, rtol=1e-4, atol=1e-4)


def test_albef_memory_moves_once_per_step() -> None:
    method, data, _ = parts("albef local")
    assert isinstance(method, ALBEF)
    before = method.text_queue.clone()  # type: ignore[operator]
    method.queue_next.fill_(10)  # type: ignore[operator]
    method("terms", data)
    method("terms", data)  # as cached accumulation and recomputation may do
    method.after_skip()
    assert method.text_queue.equal(before) and method.steps == 1  # type: ignore[operator]
    method.after_step()
    with method.teaching() as copy:
        arrived = copy.text_vector(copy.text(data.text))
    moved = torch.cat([before[:0], arrived[2:], before[4:10], arrived[:2]])  # 12 places, from the tenth on and around
    torch.testing.assert_close(method.text_queue, moved)
    assert method.steps == 2 and method.queue_next == (10 + PAIRS) % 12  # type: ignore[operator]


@pytest.mark.parametrize("name", ["vilt", "meter", "albef local", "uniter itm"])
def test_pairs_are_scored_as_the_matching_head_says(name: str) -> None:
    """Each pair by itself, whatever else is in the batch."""
    method, data, _ = parts(name)
    image, text = method.encode_image(data.pictures), method.encode_text(data.text)  # type: ignore[operator]
    whole = method.score_pairs(image, text)  # type: ignore[operator]
    assert whole.shape == (PAIRS,) and len(set(whole.tolist())) == PAIRS
    for i in range(PAIRS):
        alone = method.score_pairs(pack([unpack(image)[i]]), pack([unpack(text)[i]]))  # type: ignore[operator]
        torch.testing.assert_close(alone[0], whole[i], **CLOSE)


@pytest.mark.parametrize("name", ["vilt", "meter", "albef local", "uniter mlm", "uniter itm", "slip", "align"])
def test_one_batch_is_learnt_by_heart(name: str) -> None:
    method, data = build(name), batch(name, PAIRS, 0, PAIRS)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(30):
        terms = method("terms", data)
        loss = loss_of(terms, method.counts(data), 1)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0], losses[::10]


def test_normalisation_of_vectors() -> None:
    method, data, _ = parts("albef local")
    assert isinstance(method, ALBEF)
    image, text = method.vectors(method.encode_image(data.pictures), method.encode_text(data.text))
    for x in (image, text):
        torch.testing.assert_close(x, normalize(x, dim=-1))
