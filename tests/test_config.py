"""A field is declared once: its default, its values and its meaning; the rest follows from that."""

import json

import pytest
from ml_collections import ConfigDict

from astrolabe_jax.arithmetic import repeats
from astrolabe_jax.config import (
    FIELDS,
    REFERENCE_SWITCHES,
    RENAMED,
    SECTIONS,
    describe_fields,
    flatten,
    get_config,
    renamed,
    with_reference,
)
from configs import moving_shapes


def test_the_config_holds_every_declared_field_with_its_default():
    config = get_config()
    flat = flatten(config)
    declared = {name: field.default for name, field in FIELDS.items() if name != "rewards"}
    assert flat.keys() == declared.keys()
    for name, default in declared.items():
        value = tuple(flat[name]) if isinstance(default, tuple) else flat[name]
        assert value == default and type(value) is type(default), name
    assert config.sampler.steps == (1000, 750, 500, 250)
    assert dict(config.rewards) == {}
    assert config.is_locked and not config.rewards.is_locked


@pytest.mark.parametrize("name", FIELDS)
def test_a_declaration_is_whole(name):
    field = FIELDS[name]
    assert field.meaning[0].isupper() and field.meaning[-1] in ".)"
    assert field.constraint is None or field.constraint.allows(field.default)


def test_the_table_of_fields_has_each_field_once():
    table = describe_fields()
    headings = [line[3:] for line in table.splitlines() if line.startswith("## ")]
    assert headings == list(SECTIONS)
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| `")]
    assert [row[0] for row in rows] == [f"| `{name}`" for name in FIELDS]
    assert {len(row) for row in rows} == {4}
    assert (
        "| `model.window` | `-1` | at least 1, or -1 | Latent frames that attention sees, with"
        in table
    )


def test_two_configs_do_not_share_rewards():
    get_config().rewards.shapes_vq = 1.0
    assert not get_config().rewards


def test_misspelt_fields_are_refused():
    config = get_config()
    with pytest.raises(AttributeError, match="learning_rate"):
        config.optimizer.learnig_rate = 1.0
    with pytest.raises(KeyError):
        config.update_from_flattened_dict({"optimizer.learnig_rate": 1.0})


def test_every_reference_switch_changes_the_config_and_only_its_fields():
    default = flatten(get_config())
    for switch, fields in REFERENCE_SWITCHES.items():
        changed = flatten(with_reference(get_config(), switch))
        assert {field for field in default if changed[field] != default[field]} == set(fields)
    every = flatten(with_reference(get_config()))
    for fields in REFERENCE_SWITCHES.values():
        assert all(every[field] == value for field, value in fields.items())
    with pytest.raises(
        ValueError, match="unknown reference switch 'contxt'; expected one of context"
    ):
        with_reference(get_config(), "contxt")


@pytest.mark.parametrize("variant", ["refrence", "reference,contxt"])
def test_unknown_variants_of_the_recipe_are_refused(variant):
    with pytest.raises(ValueError, match="unknown"):
        moving_shapes.get_config(variant)


def test_repeated_prompts_minus_one_is_every_batch_of_the_epoch():
    config = moving_shapes.get_config()
    assert repeats(config) == 1
    with_reference(config, "repeated_prompts")
    assert repeats(config) == 48 // config.sampler.batch


def test_flatten_survives_json_and_is_flat():
    flat = flatten(moving_shapes.get_config())
    assert json.loads(json.dumps(flat)) == flat
    assert flat["sampler.steps"] == [1000, 750, 500, 250]


def test_no_secret_of_an_address_is_recorded():
    config = moving_shapes.get_config()
    config.rewards.taste = ConfigDict({"url": "https://host/score?key=secret", "weight": 1.0})
    assert flatten(config)["rewards.taste.url"] == "https://host/score"


def test_old_names_are_known_and_gone():
    assert renamed("optimiser.learning_rate") == "optimizer.learning_rate"
    assert renamed("optimiser") == "optimizer"
    assert renamed("prompts.groups") == "prompts.prompts_per_epoch"
    assert renamed("optimizer.learning_rate") is None
    assert renamed("prompts.groupsize") is None
    names = {*FIELDS, *(name.rpartition(".")[0] for name in FIELDS)}
    assert not names & RENAMED.keys()
    assert names >= set(RENAMED.values())
