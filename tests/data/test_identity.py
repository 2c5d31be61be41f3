"""What an annotated file is told by: the model's weights and configuration, its precision, its
content; what has been through other programs, and what was damaged.
"""

import copy
import json
import logging
import re

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, concatenate_datasets, load_dataset
from tiny import tiny_llama, tiny_tokenizer

from treg.data import SIDES, ExampleLoader, PairCollator, dataset_card
from treg.data.annotated import is_annotated, read_annotated, read_meta
from treg.data.fingerprints import (
    checksum,
    model_fingerprint,
    sampled_fingerprint,
)
from treg.data.tables import read_parquet
from treg.integrations.common import looked_up
from treg.rewards.annotate import AnnotateOptions, annotate
from treg.rewards.lookup import TokenRewards

CHAT = tiny_tokenizer()
MODEL = tiny_llama(len(CHAT))
PAIRS = 6
STREAMS = {"token_rewards": "alpha=0"}


def rows(start=0):
    return [
        {"prompt": f"{i} + {i}?", "chosen": f"the answer is {2 * i}.", "rejected": f"the sun {i}"}
        for i in range(start, start + PAIRS)
    ]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("identity") / "a.parquet"
    options = AnnotateOptions(per_token=True)
    annotate(copy.deepcopy(MODEL), CHAT, rows(), path, options, progress=False)
    return path


@pytest.fixture(scope="module")
def other_file(tmp_path_factory):
    """Other rows by the same model."""
    path = tmp_path_factory.mktemp("identity") / "b.parquet"
    options = AnnotateOptions(per_token=True, tokens_per_batch=512)
    annotate(copy.deepcopy(MODEL), CHAT, rows(50), path, options, progress=False)
    return path


def loaded(source, model=MODEL, **more):
    return ExampleLoader(CHAT, model, max_length=None, streams=STREAMS, **more)(source, "train")


def same(a, b):
    """Whether two examples have the same ids and numbers."""
    names = [x for x in a if x.endswith(("ids", "rewards", "logps"))]
    return all(np.array_equal(a[name], b[name]) for name in names) and len(names) > 7


# -- which model it is
# -


@pytest.mark.parametrize("place", ["first", "any", "last"])
def test_every_weight_counts(place):
    """Also those between the 64 that the first form looked at."""
    model = copy.deepcopy(MODEL)
    weight = dict(model.named_parameters())["model.layers.1.mlp.up_proj.weight"]
    flat = weight.data.view(-1)
    at = {"first": 0, "any": 1003, "last": len(flat) - 1}[place]
    flat[at] += 1
    assert model_fingerprint(model) != model_fingerprint(MODEL)
    assert (sampled_fingerprint(model) == sampled_fingerprint(MODEL)) == (place == "any")


def test_places_count():
    values = torch.arange(1.0, 10.0)
    found = {checksum(values), checksum(values.flip(0)), checksum(values.roll(4))}
    found |= {checksum(torch.cat([values, torch.zeros(3)])), checksum(values[:8])}
    assert len(found) >= 4  # zeros at the end are told by the shape
    assert checksum(values) == checksum(values.bfloat16()) == checksum(values.double())
    # a slice that starts anywhere, and more than one chunk
    assert checksum(torch.arange(10.0)[1:]) == checksum(values)


def test_a_long_tensor_is_the_sum_of_its_chunks(monkeypatch):
    values = torch.randn(1001)
    whole = checksum(values)
    monkeypatch.setattr("treg.data.fingerprints.CHUNK", 64)
    assert checksum(values) == whole


def reconfigured(change):
    """The model with some of its configuration changed."""
    model = copy.deepcopy(MODEL)
    for name, value in change.items():
        setattr(model.config, name, value)
    return model


@pytest.mark.parametrize(
    "change",
    [
        {"rms_norm_eps": 1e-2},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
        {"num_attention_heads": 2},
    ],
    ids=lambda x: next(iter(x)),
)
def test_a_configuration_that_changes_numbers_is_another_model(file, change):
    model = reconfigured(change)
    name = next(iter(change))
    with pytest.raises(ValueError, match=f"the same weights with {name}"):
        loaded(file, model)


@pytest.mark.parametrize(
    "change",
    [
        {"use_cache": False},
        {"attention_dropout": 0.1},
        {"_name_or_path": "elsewhere"},
        {"transformers_version": "9"},
        {"pad_token_id": 1},
        {"initializer_range": 0.5},
    ],
    ids=lambda x: next(iter(x)),
)
def test_what_changes_no_number_is_the_same_model(file, change):
    model = reconfigured(change)
    assert len(loaded(file, model)) == PAIRS


def test_a_name_that_one_version_of_transformers_has_alone(file):
    model = copy.deepcopy(MODEL)
    model.config.a_new_option = 5
    assert len(loaded(file, model)) == PAIRS


def as_before(file, path, fingerprint):
    """The file as an earlier version wrote it: neither description nor checksums in columns."""
    table = read_parquet(file)
    meta = read_meta(file)
    meta["fingerprint"]["model"] = fingerprint
    meta.pop("config")
    names = ["treg", "treg_checksum", "prompt_text", "chosen_text", "rejected_text"]
    table = table.drop_columns(names).replace_schema_metadata({"treg": json.dumps(meta)})
    pq.write_table(table, path)


def test_files_of_an_earlier_version(file, tmp_path, caplog):
    path = tmp_path / "old.parquet"
    as_before(file, path, sampled_fingerprint(MODEL))
    with caplog.at_level(logging.WARNING):
        assert all(same(*x) for x in zip(loaded(path), loaded(file), strict=True))
    assert "by an earlier version" in caplog.text
    with pytest.raises(ValueError, match="by an earlier version"):
        loaded(path, tiny_llama(len(CHAT), initializer_range=0.2))


def test_precision_is_compared(file, caplog):
    """The file was made in float32."""
    with caplog.at_level(logging.WARNING):
        loaded(file)
        assert not caplog.text
        loaded(file, copy.deepcopy(MODEL).bfloat16())
    assert "made in float32, and training runs in bfloat16" in caplog.text
    assert "annotate with --dtype bfloat16, or train with --dtype float32" in caplog.text
    caplog.clear()
    loaded(file, autocast=torch.bfloat16)
    assert "annotate with --dtype float32 --bf16" in caplog.text


def test_ids_beyond_the_vocabulary(file):
    model = copy.deepcopy(MODEL)
    model.config.vocab_size = 50
    with pytest.raises(ValueError, match="expected token ids from 0 to 49, the model's vocabulary"):
        loaded(file, model, check_fingerprint=False)


# -- through other programs
# -


def by_datasets(file, folder):
    cache = str(folder / "cache")
    found = load_dataset("parquet", data_files=str(file), split="train", cache_dir=cache)
    found = found.filter(lambda row: row["index"] != 2).map(lambda row: {"note": "x"})
    return found.shuffle(seed=1)


def through_disk(file, folder):
    by_datasets(file, folder).save_to_disk(str(folder / "saved"))
    return str(folder / "saved")


def through_parquet(file, folder):
    (folder / "shards").mkdir()
    found = by_datasets(file, folder)
    for i in range(2):
        found.shard(2, i).to_parquet(str(folder / "shards" / f"train-{i}.parquet"))
    return folder / "shards"


def through_pandas(file, folder):
    frame = pd.read_parquet(file)
    frame = frame[frame["index"] != 2].sample(frac=1, random_state=0)
    frame.to_parquet(folder / "pandas.parquet")
    return folder / "pandas.parquet"


WAYS = {
    "datasets": by_datasets,
    "saved": through_disk,
    "parquet": through_parquet,
    "pandas file": through_pandas,
    "pandas": lambda file, folder: pd.read_parquet(through_pandas(file, folder)),
    "list": lambda file, folder: by_datasets(file, folder).to_list(),
}


@pytest.mark.parametrize("way", WAYS)
def test_filtered_and_shuffled(file, tmp_path, way):
    source = WAYS[way](file, tmp_path)
    assert is_annotated(source)
    examples, meta = read_annotated(source)
    before, all_meta = read_annotated(file)
    found = {x["index"]: x for x in examples}
    assert found.keys() == {0, 1, 3, 4, 5}
    assert list(found) != sorted(found)
    assert all(same(x, before[i]) for i, x in found.items())
    assert meta["fingerprint"]["model"] == all_meta["fingerprint"]["model"]
    assert read_meta(source) == meta
    assert len(loaded(source)) == PAIRS - 1
    with pytest.raises(ValueError, match="expected data annotated with this model"):
        loaded(source, tiny_llama(len(CHAT), initializer_range=0.2))
    rewards = TokenRewards(source)
    ids = np.concatenate([before[0]["prompt_ids"], before[0]["chosen_ids"]])
    np.testing.assert_array_equal(
        rewards.of(ids)[len(before[0]["prompt_ids"]) :], before[0]["chosen_token_rewards"]
    )


def test_text_beside_the_ids(file):
    examples, _ = read_annotated(file)
    for i, example in enumerate(examples):
        assert example["chosen_text"] == f"the answer is {2 * i}.<|im_end|>\n"
        assert example["prompt_text"].startswith("<|im_start|>user\n")
        for name in ("prompt", "chosen", "rejected"):
            assert CHAT(example[f"{name}_text"])["input_ids"] == example[f"{name}_ids"].tolist()


def test_two_files_together(file, other_file, tmp_path):
    both = [read_annotated(x)[0] for x in (file, other_file)]
    (tmp_path / "folder").mkdir()
    for i, path in enumerate((file, other_file)):
        (tmp_path / "folder" / f"{i}.parquet").write_bytes(path.read_bytes())
    frames = pd.concat([pd.read_parquet(x) for x in (file, other_file)])
    datasets = concatenate_datasets([Dataset.from_parquet(str(x)) for x in (file, other_file)])
    for source in ([file, str(other_file)], tmp_path / "folder", frames, datasets):
        examples = loaded(source)
        assert all(same(*x) for x in zip(examples, [*both[0], *both[1]], strict=True))


def test_files_that_were_not_annotated_alike(file, tmp_path):
    path = tmp_path / "c.parquet"
    other = tiny_llama(len(CHAT), initializer_range=0.2)
    annotate(other, CHAT, rows(50), path, AnnotateOptions(per_token=True), progress=False)
    with pytest.raises(ValueError, match=r"annotated alike, got some with fingerprint\.model"):
        read_annotated([file, path])
    path = tmp_path / "d.parquet"
    annotate(copy.deepcopy(MODEL), CHAT, rows(50), path, progress=False)
    with pytest.raises(ValueError, match=r"d\.parquet: expected the columns of .*token_logps"):
        read_annotated([file, path])


def test_other_types_are_converted_or_refused(file, tmp_path):
    table, path = read_parquet(file), tmp_path / "t.parquet"
    ids = table.column("chosen_ids")

    def written(kind, column=ids):
        at = table.column_names.index("chosen_ids")
        pq.write_table(table.set_column(at, "chosen_ids", column.cast(kind)), path)
        return path

    before = read_annotated(file)[0]
    for kind in (pa.large_list(pa.int64()), pa.list_(pa.float64()), pa.large_list(pa.float32())):
        examples = read_annotated(written(kind))[0]
        assert all(same(*x) for x in zip(examples, before, strict=True))
    halves = pa.chunked_array([pa.array([[0.5]] * PAIRS)])
    with pytest.raises(ValueError, match=r"t\.parquet: chosen_ids: expected list<.*int32"):
        read_annotated(written(pa.list_(pa.float64()), halves))
    nulls = pa.chunked_array([pa.array([[1, None]] * PAIRS)])
    with pytest.raises(ValueError, match=r"t\.parquet: row 0: expected token ids in chosen_ids"):
        read_annotated(written(pa.list_(pa.int32()), nulls))


def test_a_card_that_the_hub_reads(file, tmp_path):
    card_module = pytest.importorskip("huggingface_hub")
    path = tmp_path / "a.parquet"
    path.write_bytes(file.read_bytes())
    card = card_module.DatasetCard.load(dataset_card(path, license="apache-2.0"))
    assert card.data.license == "apache-2.0" and "treg" in card.data.tags
    assert card.data.size_categories == ["n<1K"]
    assert load_dataset(str(tmp_path), cache_dir=str(tmp_path / "cache"))["train"].num_rows == PAIRS
    assert f'"model": "{model_fingerprint(MODEL)}"' in card.text
    with pytest.raises(FileExistsError):
        dataset_card(path)


def test_ones_own_loop_and_the_integrations_read_it(file, tmp_path):
    """What Axolotl, LLaMA-Factory, ms-swift, OpenRLHF and NeMo-RL call with the file's path, and
    batches for a loop of one's own.
    """
    path = through_pandas(file, tmp_path)
    examples, _ = read_annotated(path)
    batch = PairCollator(CHAT.pad_token_id)(examples[:2])
    wanted = [examples[i][f"{side}_token_rewards"] for side in SIDES for i in range(2)]
    np.testing.assert_array_equal(batch["token_rewards"], np.concatenate(wanted))
    found = looked_up(str(path), 0)
    for example in examples:
        ids = np.concatenate([example["prompt_ids"], example["rejected_ids"]])
        rewards = found.of(ids)[len(example["prompt_ids"]) :]
        np.testing.assert_array_equal(rewards, example["rejected_token_rewards"])


# -- files that lie, and damaged ones
# -

LIES = {
    "reward": ("chosen_token_rewards", lambda x: [5.0] * len(x), r"within \+-0\.5, got 5"),
    "huge": ("chosen_token_rewards", lambda x: [1e30] * len(x), "within .* got 1e"),
    "sum": ("ref_chosen_logps", lambda x: x + 1, "to be the sum of ref_chosen_token_logps"),
    "positive": ("ref_chosen_logps", lambda x: 50.0, "from .* to 0, the sum of .* got 50"),
    "tokens": ("ref_rejected_token_logps", lambda x: x - 100, "to be the sum"),
    "ignored": ("chosen_ids", lambda x: [*x[:-1], -100], "expected token ids >= 0 .* got -100"),
    "other ids": ("chosen_ids", lambda x: [*x[:-1], 7], "got other ids"),
    "other rewards": ("chosen_token_rewards", lambda x: x * 0.5, "got other token_rewards"),
}


@pytest.mark.parametrize("checked", [True, False], ids=["with checksums", "without"])
@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_lies(file, tmp_path, lie, checked):
    name, change, message = LIES[lie]
    frame = pd.read_parquet(file)
    frame.at[3, name] = change(frame.at[3, name])
    if not checked:
        frame = frame.drop(columns=["treg_checksum"])
    frame.to_parquet(tmp_path / "lie.parquet")
    if not checked and lie.startswith("other"):
        assert len(loaded(tmp_path / "lie.parquet")) == PAIRS  # the change is meant
        return
    with pytest.raises(ValueError, match=rf"lie\.parquet: row 3: .*{message}"):
        read_annotated(tmp_path / "lie.parquet")


def test_columns_that_are_left_out_take_their_checksums_along(file, tmp_path):
    frame = pd.read_parquet(file)
    names = [x for x in frame.columns if x.startswith("ref_")]
    frame.drop(columns=names).to_parquet(tmp_path / "no-ref.parquet")
    assert "ref_chosen_logps" not in read_annotated(tmp_path / "no-ref.parquet")[0][0]


def test_no_bit_of_a_file_changes_unseen(file, tmp_path):
    """Every flip of a bit in a sample of the bytes: refused by the name of the file, or without
    any effect on what is read.
    """
    whole, path = file.read_bytes(), tmp_path / "flipped.parquet"
    before, meta = read_annotated(file)
    refused = 0
    generator = np.random.default_rng(0)
    for at in generator.choice(len(whole), 150, replace=False):
        data = bytearray(whole)
        data[at] ^= 1 << int(generator.integers(8))
        path.write_bytes(data)
        try:
            examples, found = read_annotated(path)
        except ValueError as error:
            assert re.search(r"flipped\.parquet", str(error)), str(error)
            refused += 1
            continue
        assert found == meta
        assert all(same(*x) for x in zip(examples, before, strict=True)), at
    assert refused > 40
