"""transformers models with `attn_implementation = "lighthouse"`: layers compute what our layer does, or refuse."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from torchtitan_ext.lighthouse import LighthouseConfig, hugging_face, lighthouse_attention

N, DENSE = 64, 1
SETTINGS = {"levels": 3, "pooling_factor": 2, "top_k": 8, "tile_winners": 4, "dense_layers": [DENSE]}
SIZES = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1}
TOKENS = torch.randperm(254, generator=torch.Generator().manual_seed(0))[: 2 * N].view(2, N) + 2  # no ties of scores
WHOLE = torch.ones_like(TOKENS)
PADDED = torch.arange(N) >= torch.tensor([[5], [0]])  # on the left
HYBRID = {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}
HYBRID |= {"use_sliding_window": True, "sliding_window": 16}


def model_of(family="Llama", lighthouse=SETTINGS, **changes):
    hugging_face.register()
    config = getattr(transformers, f"{family}Config")(**SIZES | changes, lighthouse=lighthouse)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")._from_config(config, attn_implementation="lighthouse")
    return model.train()


def gradients(model):
    loss = model(TOKENS, labels=TOKENS, use_cache=False).loss
    return torch.autograd.grad(loss, list(model.parameters()))


def own_attention(module, hidden_states, position_embeddings, attention_mask, **_):
    """What an attention module should compute, from its weights and the layer's own function."""
    q, k, v = (proj(hidden_states).unflatten(-1, (-1, 8)) for proj in (module.q_proj, module.k_proj, module.v_proj))
    if hasattr(module, "q_norm"):
        q, k = module.q_norm(q), module.k_norm(k)

    def attend(q, k, v, enable_gqa=True):
        options = {"scale": module.scaling, "enable_gqa": enable_gqa, "is_causal": attention_mask is None}
        return F.scaled_dot_product_attention(q, k, v, attention_mask, **options)

    if module.layer_idx == DENSE:
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings, unsqueeze_dim=2)
        out = attend(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    else:
        config = LighthouseConfig(3, 2, 8, tile_winners=4, rope="base")
        out = lighthouse_attention(q, k, v, config, freqs_cis=position_embeddings, attention=attend)
    return module.o_proj(out.flatten(2))


FAMILIES = [("Llama", {}), ("Mistral", {"sliding_window": None}), ("Qwen3", {}), ("Qwen3", HYBRID)]


@pytest.mark.parametrize(("family", "changes"), FAMILIES, ids=["Llama", "Mistral", "Qwen3", "hybrid"])
@pytest.mark.parametrize("scaling", [8**-0.5, 0.5])
def test_every_layer_is_the_layers_own_function(family, changes, scaling):
    model, compared = model_of(family, **changes), []
    for name, parameter in model.named_parameters():
        if "q_norm" in name or "k_norm" in name:  # all are 1, and norms equal: rounding would select
            torch.nn.init.normal_(parameter)

    def compare(module, args, kwargs, output):
        torch.testing.assert_close(output[0], own_attention(module, **kwargs))
        compared.append(module.layer_idx)

    for layer in model.model.layers:
        layer.self_attn.scaling = scaling
        layer.self_attn.register_forward_hook(compare, with_kwargs=True)
    model(TOKENS, attention_mask=WHOLE)
    assert compared == [0, 1, 2]


def test_checkpointed_and_loaded_again_it_has_the_same_gradients(tmp_path):
    model = model_of()
    expected = gradients(model)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="lighthouse").train()
    again.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradients(again), expected)
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).train()
    assert not torch.allclose(gradients(dense)[0], expected[0])


@pytest.mark.slow
def test_its_layers_compile():
    model, expected = model_of(), gradients(model_of())
    for layer in model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(model), expected)


@pytest.mark.parametrize("mask", [WHOLE, PADDED.long(), PADDED.long().flip(1)], ids=["whole", "left", "right"])
def test_in_eval_mode_it_attends_densely_and_generates(mask):
    model = model_of().eval()
    logits = model(TOKENS, attention_mask=mask).logits
    generated = model.generate(TOKENS, attention_mask=mask, max_new_tokens=3, do_sample=False)
    model.set_attn_implementation("sdpa")
    assert torch.equal(logits, model(TOKENS, attention_mask=mask).logits)
    assert torch.equal(generated, model.generate(TOKENS, attention_mask=mask, max_new_tokens=3, do_sample=False))


RESTART = torch.arange(N).remainder(N // 2).unsqueeze(0)
REFUSED = [
    ({}, {"attention_mask": PADDED.long()}, "attention_mask hides some of the past .padding"),
    ({}, {"attention_mask": PADDED.long().flip(1)}, "attention_mask hides some of the past .padding"),
    ({}, {"position_ids": RESTART, "use_cache": False}, "attention_mask hides .*packed documents"),
    ({}, {"position_ids": RESTART}, "position_ids restart"),
    *(({}, {x: 1}, f"{x} has no effect") for x in ("softcap", "s_aux", "position_bias", "cu_seq_lens_q")),
    ({}, {"is_causal": False}, "is_causal is false"),
    ({}, {"input_ids": TOKENS[:, :-1]}, "seq_len = 63: must be a multiple of .* nearest: seq_len = 56 or 64"),
    ({"attention_dropout": 0.1}, {}, "layer 0 trains .* is 0.1; set attention_dropout to 0, or add 0 to config"),
    ({"family": "Mistral", "sliding_window": 16}, {}, "a sliding window"),
    ({"lighthouse": None}, {}, "config has no `lighthouse`"),
    ({"lighthouse": {"rope": "selected"}}, {}, r"lighthouse\['rope'\]: must be one of levels, .*, dense_layers"),
    ({"lighthouse": {"dense_layers": [3]}}, {}, r"has 3: must be of 0 ... 2"),
    ({"lighthouse": {"dense_layers": None, "top_k": 100}}, {}, "top_k = 100: must be a multiple"),
]


@pytest.mark.parametrize(("changes", "inputs", "message"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_what_it_cannot_train_is_refused(changes, inputs, message):
    with pytest.raises(ValueError, match=message):
        model_of(**changes)(**{"input_ids": TOKENS} | inputs)


def test_it_does_not_generate_in_training_mode():
    with pytest.raises(ValueError, match=r"more keys than queries .a cache.; generate after model.eval"):
        model_of().generate(TOKENS, max_new_tokens=2)


@pytest.mark.slow
def test_it_trains_under_the_trainer_and_is_evaluated_densely(tmp_path, monkeypatch):
    calls, data = [], [{"input_ids": tokens, "labels": tokens} for tokens in TOKENS.repeat(4, 1)]
    monkeypatch.setattr(hugging_face, "lighthouse_attention", lambda *x: calls.append(1) or lighthouse_attention(*x))
    options = {"max_steps": 8, "learning_rate": 0.01, "gradient_checkpointing": True, "report_to": "none"}
    options |= {"logging_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "no", "bf16": True}
    arguments = transformers.TrainingArguments(tmp_path, use_cpu=True, **options)
    model = model_of(lighthouse=SETTINGS | {"scorer": "dilated"})
    trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0] - 0.5
    assert len(calls) == 8 * 2 * 2  # steps, layers, forward and recomputed
    evaluated = trainer.evaluate()["eval_loss"]
    assert len(calls) == 8 * 2 * 2
    trainer.model.set_attn_implementation("sdpa")
    assert evaluated == trainer.evaluate()["eval_loss"]
