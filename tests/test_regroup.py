"""Fewer KV heads: rotations leave a model alone, alignment undoes them, and the result is the stock architecture."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from conftest import COMMON, FAMILIES

from attnconvert import cli, embedded
from attnconvert.convert import regroup as regrouping
from attnconvert.errors import AttnConvertError
from attnconvert.surgery import regroup as surgery
from attnconvert.surgery.regroup import inits
from attnconvert.surgery.sites import Site

OWN = {
    "llama": FAMILIES["llama"],
    "llama with biases": lambda: transformers.LlamaConfig(**COMMON, attention_bias=True),
    "qwen2": FAMILIES["qwen2"],
    "phi": lambda: transformers.PhiConfig(**COMMON, rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
    "stablelm": lambda: transformers.StableLmConfig(
        **COMMON, use_qkv_bias=True, rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    ),
    "cohere": lambda: transformers.CohereConfig(**COMMON),
    "glm": lambda: transformers.GlmConfig(**COMMON, head_dim=8, attention_bias=True),  # partial and interleaved
    "smollm3": FAMILIES["smollm3"],
    "gemma2": lambda: transformers.Gemma2Config(**COMMON, head_dim=8, query_pre_attn_scalar=8, sliding_window=8),
}
QK_NORM = {"qwen3": FAMILIES["qwen3"], "gemma3_text": FAMILIES["gemma3_text"]}
IDS = torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(5))


def build(config, seed=1):
    """A random fp32 model, sharp enough that a wrong rotation shows, with biases and norms that are not their init."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            parameter.data.mul_(5.0)
        elif name.endswith("bias"):
            parameter.data.normal_(0, 0.5)
        else:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def prepare(model, targets=()):
    sites = surgery.check_architecture(model.config, targets)
    return sites, surgery.find_freedom(model, sites)


def moments_of(model, sites):
    with torch.no_grad(), surgery.second_moments(model, sites) as moments:
        model.base_model(torch.randint(0, model.config.vocab_size, (8, 64), generator=torch.Generator().manual_seed(2)))
    return moments


def spread(model, sites, freedoms, num_heads, seed=3):
    """`model` with each KV head repeated until there are `num_heads`, and every copy turned at random: the same function."""
    wide_sites = [Site(**{**vars(site), "num_key_value_heads": num_heads}) for site in sites]
    turns = surgery.random_turns(wide_sites, freedoms, seed)
    tensors = {}
    for site in sites:
        source = surgery.read_projections(model.get_submodule(site.path), site).to(torch.float64)
        made = surgery.fold(source, *(surgery.rotation(turn) for turn in turns[site.layer_idx]), num_heads).to(torch.float32)
        tensors |= {f"{site.path}.{name}": tensor for name, tensor in surgery.projection_tensors(made, model.get_submodule(site.path)).items()}
    wide = copy.deepcopy(model)
    surgery.install(wide, surgery.Regrouped(num_heads, tensors))
    return wide


# ---------------------------------------------------------------- rotations


@pytest.mark.parametrize("name", [*OWN, *QK_NORM])
def test_turning_every_head_at_random_leaves_logits_unchanged(name):
    model = build({**OWN, **QK_NORM}[name]())
    sites, freedoms = prepare(model)
    turns = surgery.random_turns(sites, freedoms)
    want = logits(model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    new = surgery.turned(model, sites, turns)
    with surgery.installed(model, new):
        changed = [key for key, tensor in model.state_dict().items() if not torch.allclose(tensor, before[key], atol=1e-3)]
        assert len(changed) >= (2 if name in QK_NORM else 4) * len(sites)
        assert (logits(model) - want).abs().max() <= 1e-4
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert want.std() > 0.02


def test_turning_every_head_of_the_embedded_model_leaves_logits_unchanged():
    model = transformers.AutoModelForCausalLM.from_pretrained(embedded.model_dir(), dtype=torch.float32).eval()
    sites, freedoms = prepare(model)
    want = logits(model)
    with surgery.installed(model, surgery.turned(model, sites, surgery.random_turns(sites, freedoms))):
        assert (logits(model) - want).abs().max() <= 1e-4


def test_rotary_pairs_are_found_whatever_the_family_calls_them():
    def of(name):
        return prepare(build(OWN[name]()))[1]

    assert of("llama")[0].pairs.tolist() == [[i, i + 4] for i in range(4)]
    assert of("cohere")[0].pairs.tolist() == [[2 * i, 2 * i + 1] for i in range(4)]
    assert of("phi")[0].pairs.tolist() == [[0, 2], [1, 3]]
    assert of("phi")[0].free.tolist() == [4, 5, 6, 7]
    assert of("glm")[0].pairs.tolist() == [[0, 1], [2, 3]]
    assert of("stablelm")[0].pairs.tolist() == [[0, 1]]
    nope = of("smollm3")[1]
    assert len(nope.pairs) == 0
    assert nope.free.tolist() == list(range(8))


def test_slow_rotary_pairs_count_as_pairs_and_not_as_free_channels():
    model = build(
        transformers.LlamaConfig(**{**COMMON, "max_position_embeddings": 8192}, head_dim=64, rope_parameters={"rope_type": "default", "rope_theta": 5e6})
    )
    assert prepare(model)[1][0].pairs.tolist() == [[i, i + 32] for i in range(32)]


def test_rotations_across_pairs_would_change_the_logits():
    model = build(OWN["llama"]())
    sites, freedoms = prepare(model)
    wrong = {idx: surgery.Freedom(torch.arange(8).view(4, 2), freedom.free) for idx, freedom in freedoms.items()}
    want = logits(model)
    with surgery.installed(model, surgery.turned(model, sites, surgery.random_turns(sites, wrong))):
        assert (logits(model) - want).abs().max() > 0.01
    with pytest.raises(AttnConvertError, match="rotation-changes-model"):
        regrouping._check_rotations(model, sites, wrong, model.config, 0)
    regrouping._check_rotations(model, sites, freedoms, model.config, 0)


@pytest.mark.parametrize("name", QK_NORM)
def test_keys_behind_a_norm_are_not_turned_and_the_reason_is_told(name):
    model = build(QK_NORM[name]())
    _, freedoms = prepare(model)
    assert all("norm" in freedom.keys_fixed and freedom.values_fixed is None for freedom in freedoms.values())
    notes = regrouping._freedom_notes(freedoms)
    assert len(notes) == 1
    assert notes[0].startswith("Keys are pooled without alignment in every layer: a norm or clip")


def test_a_norm_before_the_output_projection_keeps_values_as_they_are():
    _, freedoms = prepare(build(transformers.BitNetConfig(**COMMON)))
    assert freedoms[0].values_fixed == "something stands between the attention and the output projection"
    assert len(freedoms[0].pairs) == 4


def test_a_clip_between_projection_and_attention_is_seen():
    model = build(transformers.OlmoConfig(**COMMON, clip_qkv=8.0))
    _, freedoms = prepare(model)
    assert freedoms[0].keys_fixed is not None
    assert freedoms[0].values_fixed is not None
    _, without = prepare(build(transformers.OlmoConfig(**COMMON)))
    assert without[0].keys_fixed is without[0].values_fixed is None


# ---------------------------------------------------------------- exactness


@pytest.mark.parametrize("calibrated", [True, False], ids=["calibrated", "weights alone"])
@pytest.mark.parametrize("init", ["aligned", "svd"])
@pytest.mark.parametrize("name", ["llama", "llama with biases", "qwen2", "phi", "glm", "smollm3"])
def test_alignment_undoes_repeated_and_turned_heads_exactly(name, init, calibrated):
    model = build(OWN[name]())
    sites, freedoms = prepare(model)
    want = logits(model)
    wide = spread(model, sites, freedoms, 4)
    assert (logits(wide) - want).abs().max() <= 1e-4
    wide_sites, wide_freedoms = prepare(wide, [2])
    assert wide_sites[0].num_key_value_heads == 4
    moments = moments_of(wide, wide_sites) if calibrated else {}
    surgery.install(wide, surgery.regroup(wide, wide_sites, moments, wide_freedoms, 2, init))
    assert wide.config.num_key_value_heads == 2
    assert (logits(wide) - want).abs().max() <= 1e-4


def test_pooling_without_alignment_does_not_undo_them():
    model = build(OWN["llama"]())
    sites, freedoms = prepare(model)
    wide = spread(model, sites, freedoms, 4)
    want, (wide_sites, wide_freedoms) = logits(wide), prepare(wide, [2])
    for init in ("mean", "first", "medoid", "random"):
        with surgery.installed(wide, surgery.regroup(wide, wide_sites, moments_of(wide, wide_sites), wide_freedoms, 2, init)):
            assert (logits(wide) - want).abs().max() > 0.01, init


def test_heads_that_no_group_boundary_respects_are_shared_out():
    config = transformers.LlamaConfig(**{**COMMON, "hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 1})
    model = build(config)
    sites, freedoms = prepare(model)
    want = logits(model)
    wide = spread(model, sites, freedoms, 6)
    wide_sites, wide_freedoms = prepare(wide, [4])  # 4 does not divide 6: a group of three query heads has one and a half old KV heads
    surgery.install(wide, surgery.regroup(wide, wide_sites, moments_of(wide, wide_sites), wide_freedoms, 4, "aligned"))
    assert wide.model.layers[0].self_attn.k_proj.weight.shape == (4 * 8, 96)
    assert (logits(wide) - want).abs().max() <= 1e-4


def test_mean_first_and_medoid_pool_what_they_say():
    model = build(OWN["llama with biases"]())
    sites, freedoms = prepare(model, [1])
    module = model.model.layers[0].self_attn
    k, bias = module.k_proj.weight.view(2, 8, 32), module.k_proj.bias.view(2, 8)

    def made(init, seed=0):
        new = surgery.regroup(model, sites, {}, freedoms, 1, init, seed).tensors
        return new["model.layers.0.self_attn.k_proj.weight"], new["model.layers.0.self_attn.k_proj.bias"]

    torch.testing.assert_close(made("mean"), (k.mean(0), bias.mean(0)))
    torch.testing.assert_close(made("first"), (k[0], bias[0]))
    assert any(torch.allclose(made("medoid")[0], head) for head in k)
    assert torch.equal(made("random")[0], made("random")[0])
    assert not torch.equal(made("random")[0], made("random", 1)[0])


def test_medoid_takes_the_head_that_is_closest_to_the_others():
    torch.manual_seed(0)
    k, other = torch.randn(8, 16), torch.randn(8, 16)
    heads = torch.stack([other, k + 0.3 * torch.randn(8, 16), k, k + 0.3 * torch.randn(8, 16)]).double()
    source = surgery.Projections(q=heads.clone(), k=heads, v=heads, o=heads.transpose(1, 2).contiguous())
    freedom = surgery.Freedom(torch.empty(0, 2, dtype=torch.int64), torch.arange(8))
    made = surgery.regroup_layer(source, torch.eye(17, dtype=torch.float64), freedom, 1, "medoid")
    assert torch.equal(made.k[0], heads[2])
    for larger in (0, 1):  # two heads are as close to each other: the larger one
        pair = heads[:2] * torch.tensor([2.0, 1.0] if larger == 0 else [1.0, 2.0])[:, None, None]
        two = surgery.Projections(q=pair.clone(), k=pair, v=pair, o=pair.transpose(1, 2).contiguous())
        assert torch.equal(surgery.regroup_layer(two, torch.eye(17, dtype=torch.float64), freedom, 1, "medoid").k[0], pair[larger])


@pytest.mark.parametrize("calibrated", [True, False], ids=["calibrated", "weights alone"])
def test_aligned_heads_put_out_as_much_as_their_members(calibrated):
    model = build(OWN["llama"]())
    sites, freedoms = prepare(model, [1])
    moments = moments_of(model, sites) if calibrated else {site.layer_idx: torch.eye(33, dtype=torch.float64) for site in sites}
    new = surgery.regroup(model, sites, moments if calibrated else {}, freedoms, 1, "aligned").tensors

    def size(weight, site):
        return torch.einsum("de,ef,df->", weight.double(), moments[site.layer_idx][:-1, :-1], weight.double()).sqrt()

    for site in sites:
        for name in ("k_proj", "v_proj"):
            old = model.get_submodule(site.path).get_submodule(name).weight.view(2, 8, 32)
            torch.testing.assert_close(size(new[f"{site.path}.{name}.weight"], site), torch.stack([size(head, site) for head in old]).mean())


def test_rotations_are_orthogonal_and_bring_heads_closer():
    torch.manual_seed(0)
    states = torch.randn(3, 500, 8, dtype=torch.float64) @ torch.randn(3, 8, 8, dtype=torch.float64)
    gram = torch.einsum("ntd,mte->ndme", states, states)[None]
    turn = inits._turned_freely(gram)
    torch.testing.assert_close(turn @ turn.transpose(2, 3), torch.eye(8, dtype=torch.float64).expand(1, 3, 8, 8))
    moments = inits._pair_moments(gram, torch.tensor([[0, 4], [1, 5], [2, 6], [3, 7]]))
    phases = inits._aligned_phases(moments)
    torch.testing.assert_close(phases.abs(), torch.ones(1, 4, 3, dtype=torch.float64))
    together = (states @ turn[0]).sum(0).square().sum()
    assert together > 1.05 * states.sum(0).square().sum()
    z = torch.complex(states[..., :4], states[..., 4:])
    assert ((z * phases[0].T[:, None]).sum(0).abs().square().sum()) > z.sum(0).abs().square().sum()


def test_svd_keeps_more_of_the_values_than_aligned_pooling():
    torch.manual_seed(0)
    heads = torch.randn(2, 8, 16, dtype=torch.float64)
    source = surgery.Projections(q=heads, k=heads, v=heads, o=torch.randn(2, 16, 8, dtype=torch.float64))
    freedom = surgery.Freedom(torch.empty(0, 2, dtype=torch.int64), torch.arange(8))
    moments = torch.eye(17, dtype=torch.float64)

    def error(init):
        made = surgery.regroup_layer(source, moments, freedom, 1, init)
        return sum(float((made.o[h] @ made.v[0] - source.o[h] @ source.v[h]).square().sum()) for h in range(2))

    assert error("svd") < error("aligned") < error("random")


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("config", "code"),
    [
        (lambda: transformers.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48), "not-a-causal-lm"),
        (FAMILIES["gpt2"], "no-kv-head-setting"),
        (FAMILIES["gpt_neox"], "no-kv-head-setting"),
        (FAMILIES["olmo2"], "cannot-regroup"),  # its k_norm has a weight per channel of every KV head
        (lambda: transformers.StableLmConfig(**COMMON, qk_layernorm=True), "cannot-regroup"),
    ],
)
def test_architectures_that_cannot_be_regrouped_are_refused_by_name(config, code):
    made = config()
    with pytest.raises(AttnConvertError) as caught:
        surgery.check_architecture(made, [1])
    assert caught.value.code == code
    assert repr(made.model_type) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("target", "said"), [(3, "its 4 query heads cannot be shared out"), (2, "the model has 2"), (8, "the model has 2"), (4, "the model has 2")]
)
def test_impossible_numbers_of_heads_name_the_possible_ones(target, said):
    config = OWN["llama"]()
    config.num_attention_heads = 4
    if target == 3:
        config = transformers.LlamaConfig(**{**COMMON, "num_key_value_heads": 4})
    with pytest.raises(AttnConvertError) as caught:
        surgery.check_architecture(config, [target])
    assert caught.value.code == "kv-heads"
    assert said in caught.value.message
    assert caught.value.expected == ("one of: 1, 2" if target == 3 else "one of: 1")


def test_a_model_with_one_kv_head_is_refused():
    with pytest.raises(AttnConvertError, match="one KV head, which cannot become fewer"):
        surgery.check_architecture(transformers.LlamaConfig(**{**COMMON, "num_key_value_heads": 1}), [1])


def write_config(folder: Path, config: dict) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def test_converted_and_quantized_models_are_refused(tmp_path):
    base = json.loads((embedded.model_dir() / "config.json").read_text())
    converted = write_config(tmp_path / "converted", {**base, "attn_plan": {"layers": []}})
    quantized = write_config(tmp_path / "quantized", {**base, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})
    for folder, code in ((converted, "already-converted"), (quantized, "quantized-model")):
        with pytest.raises(AttnConvertError) as caught:
            regrouping.regroup_model(str(folder), 1, tmp_path / "out")
        assert caught.value.code == code
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """A Llama of 2 layers, 4/2 heads and the embedded tokenizer, in bf16 on disk, with a generation config of its own."""
    folder = tmp_path_factory.mktemp("models") / "small"
    config = transformers.LlamaConfig(**{**COMMON, "vocab_size": 4096, "num_hidden_layers": 2, "eos_token_id": 0})
    model = build(config).to(torch.bfloat16)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(embedded.model_dir()).save_pretrained(folder)
    return folder


def test_regroup_writes_a_stock_checkpoint_that_plain_transformers_loads(small_model, tmp_path, capsys):
    out = tmp_path / "parent" / "one"
    code = cli.main(["regroup", str(small_model), "--kv-heads", "1", "--tokens", "1k", "--device", "cpu", "--out", str(out)])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_key_value_heads"] == 1
    assert config["dtype"] == "bfloat16"
    assert not [key for key in config if key in ("auto_map", "attn_plan")]
    assert not list(out.glob("*.py"))
    model, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert type(model) is transformers.LlamaForCausalLM
    assert model.generation_config.max_new_tokens == 7
    assert model.model.layers[0].self_attn.k_proj.weight.shape == (8, 32)
    assert transformers.AutoTokenizer.from_pretrained(out)("The whale").input_ids
    record = json.loads((out / "regroup.json").read_text())
    assert record["num_key_value_heads"] == [2, 1]
    assert record["trained"] is False
    assert str(tmp_path) not in json.dumps(record)
    assert str(small_model.parent) not in json.dumps(record)
    assert "2 -> 1 KV heads" in printed.out
    assert "cache 128 -> 64 bytes per token" in printed.out  # 2 layers x k and v x 8 channels x 2 bytes per head
    assert "No recovery training was done" in printed.out
    assert f"vllm serve {out}" in printed.out
    assert [path.name for path in out.parent.iterdir()] == ["one"]


@pytest.fixture
def no_reload(monkeypatch):
    """Without the fresh process of 4 seconds, which another test has."""
    monkeypatch.setattr("attnconvert.convert.save.check_reload", lambda model, folder: None)


@pytest.mark.usefixtures("no_reload")
def test_saved_weights_are_those_that_were_measured(small_model, tmp_path):
    report = regrouping.regroup_model(str(small_model), 1, tmp_path / "one", tokens=1024)
    rows = regrouping.compare_inits(str(small_model), [1], inits=["svd"], tokens=1024).rows
    assert rows == report.rows
    again = regrouping._prepare(str(tmp_path / "one"), [], None, 1024, None, "auto", "cpu", 0, None, None)
    measured = regrouping._measure(again, {}, "cpu", 0, None)
    assert math.isclose(measured.quality_of("teacher").nll.value, report.rows[1].loss, rel_tol=1e-6)


def test_nothing_is_left_when_the_reload_fails(small_model, tmp_path, monkeypatch):
    def fails(model, folder):
        assert (folder / "model.safetensors").exists()
        raise AttnConvertError("reload-failed", "planted")

    monkeypatch.setattr("attnconvert.convert.save.check_reload", fails)
    with pytest.raises(AttnConvertError, match="planted"):
        regrouping.regroup_model(str(small_model), 1, tmp_path / "one", tokens=1024)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_reload")
def test_an_earlier_result_is_replaced_on_request_alone(small_model, tmp_path, capsys):
    out = tmp_path / "one"
    arguments = ["regroup", str(small_model), "--kv-heads", "1", "--tokens", "1k", "--device", "cpu", "--out", str(out), "--quiet"]
    assert cli.main([*arguments, "--init", "first"]) == 0
    first = (out / "model.safetensors").read_bytes()
    assert cli.main(arguments) == 1
    assert "error[output-not-empty]" in capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == first
    assert cli.main([*arguments, "--overwrite"]) == 0
    assert (out / "model.safetensors").read_bytes() != first
    assert json.loads((out / "regroup.json").read_text())["init"] == "svd"


def test_compare_inits_ranks_alignment_before_pooling_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = cli.main(["regroup", "demo", "--kv-heads", "4", "--compare-inits", "--init", "mean,aligned,svd", "--tokens", "2k", "--device", "cpu", "--json"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    rows = {row["init"]: row for row in json.loads(printed.out)["rows"]}
    assert set(rows) == {"source", "mean", "aligned", "svd"}
    assert rows["source"]["loss"] < rows["aligned"]["loss"] < rows["mean"]["loss"] - 0.5
    assert rows["source"]["cache_bytes_per_token"] == 2 * rows["mean"]["cache_bytes_per_token"]
    assert 0 < rows["svd"]["kl"] < rows["mean"]["kl"]
    assert list(tmp_path.iterdir()) == []


def test_the_table_stars_the_lowest_loss_of_each_number_of_heads(small_model, capsys):
    assert cli.main(["regroup", str(small_model), "--kv-heads", "1", "--compare-inits", "--tokens", "1k", "--device", "cpu", "--calibration", "none"]) == 0
    out = capsys.readouterr().out
    assert all(init in out for init in surgery.INITS)
    assert out.count(" *") == 1
    assert "aligned by their weights alone" in out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--kv-heads", "3"], 1, "error[kv-heads]: 3 KV heads cannot be made: its 8 query heads cannot be shared out evenly\n  expected one of: 1, 2, 4"),
        (["--kv-heads", "16"], 1, "error[kv-heads]: 16 KV heads cannot be made: the model has 8"),
        (["--kv-heads", "many"], 2, "'many' is not a list of whole numbers"),
        (["--kv-heads", "4,2"], 2, "several need --compare-inits"),
        (["--kv-heads", "4", "--init", "median"], 2, "'median' is not one of svd, aligned, mean, medoid, first, random"),
        (["--kv-heads", "4", "--compare-inits", "--out", "x"], 2, "writes no model"),
        (["--kv-heads", "4", "--calibration", "no/such/text.txt"], 1, "error[data-missing]"),
        ([], 2, "--kv-heads"),
    ],
)
def test_mistakes_get_an_answer(arguments, code, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["regroup", "demo", *arguments]) == code
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_help_has_examples(capsys):
    assert cli.main(["regroup", "--help"]) == 0
    assert "attnconvert regroup demo --kv-heads 4" in capsys.readouterr().out.partition("Examples:")[2]


def test_the_command_line_names_the_inits_that_there_are():
    assert cli._INITS == surgery.INITS
