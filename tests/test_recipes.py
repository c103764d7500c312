"""Recipes: what the shipped ones say, and what a user is told about a wrong one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from attnconvert import recipes
from attnconvert.distill.config import TransferConfig
from attnconvert.errors import AttnConvertError, ErrorGroup
from attnconvert.recipes.load import LoadedRecipe, dump_resolved, list_recipes, load_recipe, shipped_text
from attnconvert.recipes.schema import LayerRule, assign_rules, resolve_layers
from attnconvert.surgery import registry

METHODS = {"gqa": "gqa", "mqa": "gqa", "sqa": "gqa", "kdgqa": "kdgqa", "moa": "moa", "streaming-llm": "moa", "duo-attention": "moa", "infllm-v2": "infllm_v2",
           "moba": "infllm_v2", "moh": "moh"}  # fmt: skip
SHIPPED = ["duo-attention", "gqa", "hedgehog", "hedgehog-mixed", "hedgehog-pure", "infllm-v2", "kdgqa", "lolcats", "moa", "moba", "moh", "mqa", "sqa", "streaming-llm",
           "window-sinks"]  # fmt: skip
TOKENS = {"moa": 3_000_000, "infllm_v2": 16_000_000, "moh": 4_000_000}  # without a transfer stage; the second's rows are up to 32k long

GOOD = """\
name: mine
layers:
  - match: all
    method: hedgehog
    config:
      sinks: 2
stages:
  transfer:
    tokens: 500k
  finetune:
    tokens: 1M
"""


def write(folder: Path, text: str | bytes, name: str = "mine.yaml") -> str:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def mistakes(source: str, overrides: Sequence[str] = ()) -> list[AttnConvertError]:
    """The errors of a recipe; fails when it loads."""
    with pytest.raises(AttnConvertError) as caught:
        load_recipe(source, overrides)
    return caught.value.errors if isinstance(caught.value, ErrorGroup) else [caught.value]


def mistake(source: str, *overrides: str) -> AttnConvertError:
    errors = mistakes(source, overrides)
    assert len(errors) == 1, [e.render() for e in errors]
    return errors[0]


def load(folder: Path, text: str, *overrides: str) -> LoadedRecipe:
    return load_recipe(write(folder, text), overrides)


# Shipped recipes


def test_every_shipped_recipe_is_listed_and_loads() -> None:
    assert recipes.__file__ is not None
    files = sorted(path.stem for path in Path(recipes.__file__).parent.rglob("*.y*ml"))
    assert files == list_recipes() == SHIPPED
    for name in files:
        loaded = load_recipe(name)
        assert loaded.recipe.name == name
        assert loaded.recipe.description
        assert loaded.recipe.methods == (METHODS.get(name, "hedgehog"),)
        assert loaded.source_path.name == f"{name}.yaml"
        assert loaded.text == shipped_text(name) == loaded.source_path.read_text()


@pytest.mark.parametrize("name", SHIPPED)
def test_the_resolved_dump_loads_back_to_an_equal_recipe(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name).recipe
    text = dump_resolved(recipe)
    again = load(tmp_path, text)
    assert again.recipe == recipe
    assert yaml.safe_load(text) == again.resolved
    assert "final_lr_ratio" in text  # a default that no shipped file writes
    assert "softmax_weight" in text or recipe.methods != ("hedgehog",)  # likewise, of the method


def test_recipes_meant_for_comparison_spend_the_same_tokens() -> None:
    for name in SHIPPED:
        stages = load_recipe(name).recipe.stages
        assert stages.transfer.tokens + stages.finetune.tokens == TOKENS.get(METHODS.get(name, "hedgehog"), 5_000_000), name


def test_shipped_variants_differ_from_hedgehog_only_in_what_their_name_says() -> None:
    base = load_recipe("hedgehog").resolved

    def difference(name: str) -> set[str]:
        def leaves(value: object, path: str) -> dict[str, object]:
            if isinstance(value, dict):
                return {k: v for key, child in value.items() for k, v in leaves(child, f"{path}.{key}").items()}
            if isinstance(value, list):
                return {k: v for i, child in enumerate(value) for k, v in leaves(child, f"{path}.{i}").items()}
            return {path[1:]: value}

        ours, theirs = leaves(load_recipe(name).resolved, ""), leaves(base, "")
        return {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)} - {"name", "description"}

    assert difference("hedgehog-mixed") == {"keep.fraction", "keep.by"}
    assert difference("hedgehog-pure") == {"layers.0.config.window.size", "layers.0.config.sinks", "layers.0.config.gates"}
    assert difference("window-sinks") == {"layers.0.config.linear", "stages.transfer.tokens", "stages.finetune.tokens"}


def test_the_lolcats_recipe_holds_the_published_settings() -> None:
    resolved = load_recipe("lolcats").resolved
    config, transfer, finetune = resolved["layers"][0]["config"], resolved["stages"]["transfer"], resolved["stages"]["finetune"]
    assert (config["window"], config["sinks"], config["key_map"]) == ({"kind": "block", "size": 64}, 0, "per_query_head")
    assert (transfer["loss"], transfer["relative"], transfer["lr"]) == ("output", False, 1e-2)
    assert (finetune["lr"], finetune["kl"], finetune["ce"], finetune["train_cores"]) == (1e-4, 0, 1, False)
    assert finetune["lora"] == {"rank": 8, "alpha": 16, "dropout": 0, "targets": ["q", "k", "v", "o"]}


# Errors


def test_all_mistakes_of_a_file_are_reported_at_once_with_their_lines(tmp_path: Path) -> None:
    text = GOOD.replace("tokens: 500k", "tokns: 500k\n    loss: outputs").replace("method: hedgehog", "method: hedghog")
    source = write(tmp_path, text)
    with pytest.raises(ErrorGroup) as caught:
        load_recipe(source)
    assert caught.value.render() == (
        "error[unknown-method]: unknown method 'hedghog'\n"
        f"  --> {source}:4  layers.0.method\n"
        f"  expected one of: {', '.join(registry.available())}, softmax; did you mean 'hedgehog'?\n"
        "hint: `attnconvert methods` lists each method with its options\n"
        "error[missing-key]: missing key 'tokens'\n"
        f"  --> {source}:8  stages.transfer\n"
        f"  expected tokens: {TransferConfig.model_fields['tokens'].description}\n"
        "error[unknown-key]: unknown key 'tokns'\n"
        f"  --> {source}:9  stages.transfer.tokns\n"
        f"  expected one of: {', '.join(TransferConfig.model_fields)}; did you mean 'tokens'?\n"
        "error[invalid-value]: 'outputs' is not a value of loss\n"
        f"  --> {source}:10  stages.transfer.loss\n"
        "  expected one of: output, weights; did you mean 'output'?"
    )


def test_a_duplicate_key_is_an_error_beside_the_other_mistakes(tmp_path: Path) -> None:
    source = write(tmp_path, GOOD + "seed: -1\nprecision: fp32\nseed: 4\n")
    assert [(e.code, e.where, e.expected) for e in mistakes(source)] == [
        ("invalid-value", f"{source}:12  seed", "greater than or equal to 0"),
        ("duplicate-key", f"{source}:14  seed", f"one value; the first is at {source}:12"),
    ]


@pytest.mark.parametrize(
    ("line", "code", "path", "message", "expected"),
    [
        ("sed: 3", "unknown-key", "sed", "unknown key 'sed'", "did you mean 'seed'"),
        ("precision: fp61", "invalid-value", "precision", "'fp61' is not a value of precision", "one of: auto, fp32, bf16"),
        ("keep: {fraction: 0.25, by: KL}", "invalid-value", "keep.by", "'KL' is not a value of by", "did you mean 'kl'"),
        ("keep: {fraction: 1.0}", "invalid-value", "keep.fraction", "1.0 is not accepted", "less than 1"),
        ("keep: {}", "invalid-value", "keep", "keep needs `layers` or `fraction`", "exactly one of layers, fraction"),
        ("keep: {fraction: 0.5, layers: [1]}", "invalid-value", "keep", "keep has both", "exactly one of layers, fraction"),
        ("keep: {by: kl, layers: [1]}", "invalid-value", "keep", "`by: kl` chooses layers by measurement", "beside `fraction` only"),
        ("keep: {layers: [3, 9-5]}", "invalid-layers", "keep.layers.1", "the range '9-5' runs backwards", "5-9"),
        ("keep: {layers: []}", "invalid-value", "keep.layers", "layers is empty", "at least 1 item"),
        ("data: embedded", "invalid-value", "data", "'embedded' is not a block of settings", "keys of: source, subset"),
        ("evaluate: {tokens: -100k}", "invalid-value", "evaluate.tokens", "'-100k' is not a token count", ""),
        ("description: no", "invalid-value", "description", "YAML reads this as false, not as text", "text"),
        ("evaluate: {length: yes}", "invalid-value", "evaluate.length", "true is not accepted", "greater than or equal to 16"),
        ("evaluate: {passkey_trials: yes}", "invalid-value", "evaluate.passkey_trials", "true is not a number", "a number"),
        ("data: {eval_fraction: .nan}", "invalid-value", "data.eval_fraction", "nan", ""),
        ("reference: hedgehog paper", "invalid-value", "reference", "'hedgehog paper' is not accepted", "URL"),
        ("3: x", "unknown-key", "", "'3' is not a key", "a word"),
        ("<<: {seed: 3}", "unknown-key", "", "'<<' is not a key", "a word"),
        ("data: !!python/name:os.system x", "invalid-yaml", "data", "recipes do not use YAML tags", ""),
    ],
)
def test_a_wrong_line_is_named_with_what_was_expected(line: str, code: str, path: str, message: str, expected: str, tmp_path: Path) -> None:
    source = write(tmp_path, GOOD + line + "\n")
    error = mistake(source)
    assert (error.code, error.where) == (code, f"{source}:12  {path}".rstrip())
    assert message in error.message
    assert expected in (error.expected or "")


@pytest.mark.parametrize(
    ("rules", "path", "message"),
    [
        ("[{match: every, method: hedgehog}]", "layers.0.match", "'every' names no layers"),
        ("[{match: 3, method: hedgehog}]", "layers.0.match", "3 names no layers"),
        ("[{match: [], method: hedgehog}]", "layers.0.match", "the list names no layer"),
        ("[{match: [0, 1.5], method: hedgehog}]", "layers.0.match.1", "1.5 names no layer"),
        ("[{match: [true], method: hedgehog}]", "layers.0.match.0", "True names no layer"),
        ("[{match: [-1--4], method: hedgehog}]", "layers.0.match.0", "runs backwards"),
        ("[{match: all, method: softmax, config: {sinks: 1}}]", "layers.0.config", "method softmax has no settings"),
        ("[{match: all, method: hedgehog}, {match: [1], method: softmax}]", "layers.1.match", "never used"),
        ("[{match: all, method: hedgehog, config: {window: {size: 0}, linear: false}}]", "layers.0.config", "linear: false needs a window"),
        ("[{match: all, method: hedgehog, config: {window: {sise: 8}}}]", "layers.0.config.window.sise", "unknown key 'sise'"),
        ("[{match: all, method: hedgehog, config: {sinks: -1}}]", "layers.0.config.sinks", "-1 is not accepted"),
        ("[{match: all}]", "layers.0", "missing key 'method'"),
        ("[]", "layers", "layers is empty"),
        ("hedgehog", "layers", "'hedgehog' is not a list"),
    ],
)
def test_a_wrong_layer_rule_is_one_error_at_its_own_path(rules: str, path: str, message: str, tmp_path: Path) -> None:
    source = write(tmp_path, f"name: mine\nlayers: {rules}\nstages: {{transfer: {{tokens: 1}}, finetune: {{tokens: 1}}}}\n")
    error = mistake(source)
    assert error.where == f"{source}:2  {path}"
    assert message in error.message
    assert "Value error" not in error.render()


def test_keep_without_a_converted_layer_is_an_error(tmp_path: Path) -> None:
    source = write(tmp_path, "extends: hedgehog\nname: mine\nlayers: [{match: all, method: softmax}]\nkeep: {fraction: 0.5}\n")
    error = mistake(source)
    assert (error.message, error.where) == ("keep has nothing to put back: every rule keeps softmax", f"{source}:4  keep")


@pytest.mark.parametrize("tokens", ["-1", "-2M", "1.5", "lots", "null"])
def test_token_counts_that_are_none_are_refused(tokens: str, tmp_path: Path) -> None:
    source = write(tmp_path, GOOD.replace("500k", tokens))
    assert mistake(source).where == f"{source}:9  stages.transfer.tokens"


@pytest.mark.parametrize(("text", "count"), [("500k", 500_000), ("1.5M", 1_500_000), ("2e6", 2_000_000), ("0", 0), ("1_000", 1000)])
def test_token_counts_are_decimal(text: str, count: int, tmp_path: Path) -> None:
    assert load(tmp_path, GOOD.replace("500k", text)).recipe.stages.transfer.tokens == count


@pytest.mark.parametrize(
    ("content", "code", "line", "message"),
    [
        ("", "recipe-empty", None, "holds no settings"),
        ("# only a comment\n", "recipe-empty", None, "holds no settings"),
        ("- name: x\n", "recipe-not-mapping", 1, "the top level is a list"),
        ("hedgehog\n", "recipe-not-mapping", 1, "the top level is the value 'hedgehog'"),
        ("name: x\nlayers: [1, 2\nseed: 3\n", "invalid-yaml", 3, "while parsing a flow sequence"),
        ("name: x\nstages:\n\ttransfer: 1\n", "invalid-yaml", 3, "cannot start any token"),
        ("name: x\n---\nname: y\n", "invalid-yaml", 2, "but found another document"),
        ("name: x\nseed: \x07\n", "invalid-yaml", 2, "U+0007"),
        ("[" * 5000, "invalid-yaml", None, "nested too deeply"),
        (b"\x89PNG\r\n\x1a\n", "recipe-not-text", None, "byte 0 is not UTF-8"),
        (b"GGUF\x03\x00\x00\x00", "recipe-not-text", None, "NUL bytes"),
        (b"x" * (1 << 21), "recipe-not-text", None, "larger than"),
    ],
)
def test_a_file_that_is_no_recipe_says_why(content: str | bytes, code: str, line: int | None, message: str, tmp_path: Path) -> None:
    source = write(tmp_path, content)
    error = mistake(source)
    assert (error.code, error.where) == (code, f"{source}:{line}" if line else source)
    assert message in error.message


def test_an_alias_is_refused_before_it_can_recurse(tmp_path: Path) -> None:
    source = write(tmp_path, GOOD + "data: &data\n  source: *data\n")
    assert [(e.code, e.where) for e in mistakes(source)] == [("invalid-yaml", f"{source}:13  data.source")]


def test_an_unknown_recipe_name_lists_the_shipped_ones() -> None:
    error = mistake("hedghog")
    assert error.code == "unknown-recipe"
    assert error.expected == f"one of: {', '.join(SHIPPED)}; did you mean 'hedgehog'? (or a file, such as my.yaml)"
    assert "did you mean 'lolcats'" in str(mistake("LoLCATs").expected)
    with pytest.raises(AttnConvertError, match="unknown recipe 'lolcat'"):
        shipped_text("lolcat")


def test_a_missing_file_names_the_nearest_one(tmp_path: Path) -> None:
    source = write(tmp_path, GOOD)
    error = mistake(str(tmp_path / "mien.yaml"))
    assert (error.code, error.expected) == ("recipe-not-found", f"an existing file; did you mean {source!r}?")
    assert mistake(str(tmp_path / "lolcats.yaml")).hint == "a shipped recipe is called by its name alone: `lolcats`"
    assert mistake(str(tmp_path)).message == f"{str(tmp_path)!r} is a folder"
    assert mistake("x" * 5000).code == "recipe-unreadable"


# Overrides


def test_overrides_reach_every_kind_of_place(tmp_path: Path) -> None:
    loaded = load(
        tmp_path,
        GOOD,
        "stages.transfer.tokens=2M",
        "layers.0.config.sinks=0",
        "layers.0.config.window.size=32",  # `window` is not in the file
        "layers.0.match=[0-2, -1]",
        "keep.fraction=0.5",  # `keep` is null by default
        "seed=3",
        "data.source=/some/where=odd.txt",
        "stages.finetune={tokens: 1k, lr: 1e-4}",  # PyYAML reads 1e-4 as text
    )
    recipe = loaded.recipe
    assert recipe.stages.transfer.tokens == 2_000_000
    assert recipe.layers[0].config is not None
    config = recipe.layers[0].config.model_dump()
    assert (config["sinks"], config["window"]["size"], config["linear"]) == (0, 32, True)
    assert recipe.layers[0].match == ("0-2", -1)
    assert recipe.keep is not None
    assert (recipe.keep.fraction, recipe.keep.by) == (0.5, "layer_error")
    assert recipe.seed == 3
    assert recipe.data.source == "/some/where=odd.txt"
    assert (recipe.stages.finetune.tokens, recipe.stages.finetune.lr) == (1000, 1e-4)
    assert loaded.resolved["seed"] == 3
    assert loaded.text == GOOD


def test_a_later_override_wins() -> None:
    assert load_recipe("hedgehog", ["seed=3", "seed=4"]).recipe.seed == 4
    assert load_recipe("hedgehog-mixed", ["keep=null"]).recipe.keep is None


@pytest.mark.parametrize(
    ("override", "code", "message"),
    [
        ("stages.transfer.tokns=1", "unknown-key", "unknown key 'tokns'"),
        ("stages.warmup.tokens=1", "unknown-key", "unknown key 'warmup'"),
        ("stages.transfer.tokens=-2M", "invalid-value", "'-2M' is not a token count"),
        ("stages.transfer.lr=.inf", "invalid-value", "inf is not accepted"),
        ("stages.finetune.lora.alpha=1e999", "invalid-value", "'1e999' is not accepted"),
        ("layers.0.method=hedghog", "unknown-method", "unknown method 'hedghog'"),
        ("layers.0.config.sinks=many", "invalid-value", "'many' is not accepted"),
        ("layers.1.config.sinks=0", "invalid-override", "'layers' is a list of 1; it has no item '1'"),
        ("layers.first.config.sinks=0", "invalid-override", "it has no item 'first'"),
        ("name.first=x", "invalid-override", "'name' holds the value 'hedgehog', so it has no key 'first'"),
        ("seed", "invalid-override", "not of the form path=value"),
        ("stages..tokens=1", "invalid-override", "not of the form path=value"),
        ("=3", "invalid-override", "not of the form path=value"),
        ("data.source=[a", "invalid-override", "the value is not valid YAML"),
        ("data.source=@home", "invalid-override", "the value is not valid YAML"),
        ("extends=lolcats", "invalid-override", "`extends` cannot be overridden"),
    ],
)
def test_a_wrong_override_is_named_with_its_own_text(override: str, code: str, message: str) -> None:
    error = mistake("hedgehog", override)
    assert error.code == code
    assert (error.where or "").split("  ")[0] == f"--set {override}"
    assert message in error.message


def test_wrong_overrides_and_a_wrong_file_are_reported_together_in_order(tmp_path: Path) -> None:
    source = write(tmp_path, GOOD + "precision: fp61\n")
    errors = mistakes(source, ["seed=-1", "layers.7.method=softmax", "kep.fraction=0.5"])
    assert [e.where for e in errors] == [f"{source}:12  precision", "--set seed=-1", "--set layers.7.method=softmax", "--set kep.fraction=0.5  kep"]


def test_a_rule_over_several_keys_names_the_overrides_that_broke_it() -> None:
    error = mistake("hedgehog", "stages.finetune.kl=0", "stages.finetune.ce=0")
    assert error.message.startswith("kl and ce are both 0")
    assert (error.where or "").endswith("stages.finetune  (changed by --set stages.finetune.kl=0, --set stages.finetune.ce=0)")


# extends


def test_extends_merges_mappings_and_replaces_lists(tmp_path: Path) -> None:
    write(tmp_path, "extends: hedgehog\nname: base\nseed: 5\nstages: {transfer: {tokens: 1M}}\n", "base.yml")
    child = "extends: base.yml\nname: child\nlayers: [{match: [0], method: hedgehog}]\nstages: {transfer: {lr: 3.0e-3}}\n"
    recipe = load(tmp_path, child).recipe
    assert (recipe.name, recipe.seed, recipe.stages.transfer.tokens, recipe.stages.transfer.lr) == ("child", 5, 1_000_000, 3e-3)
    assert [rule.match for rule in recipe.layers] == [(0,)]
    assert recipe.stages.finetune == load_recipe("hedgehog").recipe.stages.finetune
    assert recipe.description == ""  # the base describes another recipe


def test_an_error_in_a_base_points_into_the_base(tmp_path: Path) -> None:
    base = write(tmp_path, "extends: hedgehog\nname: base\nseed: x\n", "base.yaml")
    child = write(tmp_path, "extends: base.yaml\nname: child\nprecision: fp61\n")
    assert [e.where for e in mistakes(child)] == [f"{child}:3  precision", f"{base}:3  seed"]


def test_a_recipe_does_not_take_the_name_of_its_base(tmp_path: Path) -> None:
    error = mistake(write(tmp_path, "extends: hedgehog\nseed: 4\n"))
    assert (error.code, error.message) == ("missing-key", "missing key 'name'")


@pytest.mark.parametrize(
    ("target", "code"), [("hedghog", "unknown-recipe"), ("gone.yaml", "recipe-not-found"), ("3", "invalid-value"), ("b.yaml", "extends-cycle")]
)
def test_a_wrong_extends_points_at_its_line(target: str, code: str, tmp_path: Path) -> None:
    b = write(tmp_path, "name: b\nextends: a.yaml\n", "b.yaml")
    a = write(tmp_path, f"name: a\n\nextends: {target}\n", "a.yaml")
    error = mistake(a)
    assert (error.code, error.where) == (code, f"{b}:2  extends" if code == "extends-cycle" else f"{a}:3  extends")
    if code == "extends-cycle":
        assert error.message == "recipes extend each other in a circle: a.yaml -> b.yaml -> a.yaml"


# Layers of a model


def test_the_first_rule_that_matches_a_layer_decides() -> None:
    rules = [
        LayerRule(match=(0, -1), method="softmax"),
        LayerRule(match=("0-3", "6--2"), method="hedgehog"),
    ]
    assert assign_rules(rules, 9) == [0, 1, 1, 1, None, None, 1, 1, 0]


def test_layer_lists_are_inclusive_and_count_from_the_end() -> None:
    assert resolve_layers(["5-9", 2, "-3--1", -20], 20, where="keep.layers") == [0, 2, 5, 6, 7, 8, 9, 17, 18, 19]


@pytest.mark.parametrize("item", [20, -21, "18-20", "5--18"])
def test_a_layer_the_model_does_not_have_is_an_error(item: int | str) -> None:
    with pytest.raises(AttnConvertError) as caught:
        resolve_layers([item], 20, where="keep.layers")
    assert (caught.value.code, caught.value.where) == ("layer-out-of-range", "keep.layers")
    assert caught.value.message == f"{str(item)!r} does not fit a model of 20 layers"


def test_a_rule_that_decides_no_layer_is_an_error() -> None:
    rules = [LayerRule(match=("0-3",), method="softmax"), LayerRule(match=(-1,), method="hedgehog")]
    assert assign_rules(rules, 5) == [0, 0, 0, 0, 1]
    with pytest.raises(AttnConvertError, match="rule 1 decides no layer"):
        assign_rules(rules, 4)


@pytest.mark.parametrize(("fraction", "total", "kept"), [(0.25, 30, 7), (0.25, 32, 8), (0.29, 100, 29), (0.1, 4, 1)])
def test_a_kept_fraction_is_rounded_down_to_at_least_one(fraction: float, total: int, kept: int) -> None:
    keep = load_recipe("hedgehog-mixed", [f"keep.fraction={fraction}"]).recipe.keep
    assert keep is not None
    assert keep.num_layers(total) == kept


def test_rules_and_kept_layers_survive_the_resolved_dump(tmp_path: Path) -> None:
    text = GOOD.replace("match: all", "match: [0, 5-9, -4--1, 10--6]") + "keep: {layers: [-1, 5-6]}\n"
    text = text.replace("layers:\n", "layers:\n  - {match: [1], method: softmax}\n", 1)
    recipe = load(tmp_path, text).recipe
    assert load(tmp_path, dump_resolved(recipe)).recipe == recipe
    assert recipe.layers[0].config is None


def test_recipes_are_frozen() -> None:
    recipe = load_recipe("hedgehog").recipe
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3


def test_loading_a_recipe_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from attnconvert.recipes.load import load_recipe; load_recipe('lolcats', ['seed=1']);"
        "print(sorted({'torch', 'transformers', 'peft', 'datasets', 'attnconvert.recipes.load'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "['attnconvert.recipes.load']"
