"""Real processes of an evaluation: pairs, kills and jobs side by side end as one alone does."""

import collections
import csv
import json
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from etude.core.signals import EXIT_REQUEUE
from etude.data.shards import ShardSet
from etude.evaluation.results import Row
from etude.evaluation.table import ResultsTable
from etude.metrics.extractors.classifier import save_classifier
from etude.models.classifier import Classifier, ClassifierConfig

pytestmark = pytest.mark.timeout(400)
WORKERS = Path(__file__).parent / "workers"
WORKER = WORKERS / "evaluating.py"
KILLED = -signal.SIGKILL
COUNT, SHARD = 150, 16  # of evaluating.py


@pytest.fixture(scope="module")
def forks(serve: Callable):
    """Processes that have imported what evaluation needs, the text towers of CLIP among it."""
    modules = ["etude.cli", "etude.jobs", "etude.planning"]
    modules += ["transformers.models.clip.modeling_clip"] if find_spec("transformers") else []
    return serve(*modules)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier with random weights: its convolutions and products round."""
    folder = tmp_path_factory.mktemp("network")
    model = Classifier(ClassifierConfig(channels=(8, 16), num_classes=4), seed=3).eval()
    save_classifier(folder, model, 8, list("abcd"))
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """Every finished file below a folder, by its place; what a killed process left is not one."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(found)
        if not path.name.endswith(".tmp")
    }


def readings(folder: Path) -> dict[int, list[tuple[int, int]]]:
    """The ranges of pictures that each process read, in its order."""
    return {
        int(path.name): [tuple(map(int, line.split())) for line in path.read_text().splitlines()]
        for path in folder.iterdir()
    }


def ended(processes: list, seconds: float = 120) -> list[tuple[int, str]]:
    """Status and output of every process."""
    said = [process.communicate(seconds) for process in processes]
    return [(p.returncode, "".join(words)) for p, words in zip(processes, said, strict=True)]


@pytest.fixture(scope="module")
def alone(forks, network, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The store that one process fills, never stopped."""
    root = tmp_path_factory.mktemp("alone")
    (root / "read").mkdir()
    one = forks.start(WORKER, "extract", network, root / "store", root / "read")
    assert ended([one]) == [(0, "")]
    read = collections.Counter(i for some in readings(root / "read")[0] for i in range(*some))
    assert read == dict.fromkeys(range(COUNT), 1)
    found = files(root / "store")
    assert len([name for name in found if name.endswith("manifest.json")]) == 2
    return found


def pair_of(forks, network: Path, root: Path, **environment: str) -> list:
    (root / "read").mkdir(exist_ok=True)
    words = (WORKER, "extract", network, root / "store", root / "read")
    return ranks_of(forks, *words, **environment)


def ranks_of(forks, *words: object, **environment: str) -> list:
    """Two processes of one job, with more in their environment."""
    before = dict(forks.environment)
    forks.environment |= environment
    try:
        return forks.start_ranks(2, *words)
    finally:
        forks.environment = before


def test_two_processes_extract_what_one_does(forks, network, alone, tmp_path) -> None:
    """Ten shards for two, the last of six pictures; blocks of eight are padded, files are not."""
    assert ended(pair_of(forks, network, tmp_path)) == [(0, ""), (0, "")]
    assert files(tmp_path / "store") == alone
    read = readings(tmp_path / "read")
    assert read[0] and read[1]
    of_all = collections.Counter(i for some in [*read[0], *read[1]] for i in range(*some))
    assert of_all == dict.fromkeys(range(COUNT), 1)


def test_the_command_in_a_pair(forks, network, tmp_path) -> None:
    """`etude extract` fills one store from two processes, of which the first alone speaks."""
    images = np.random.default_rng(1).integers(0, 256, (COUNT, 9, 9, 3), dtype=np.uint8)
    np.savez(tmp_path / "pictures.npz", images)
    words = ("-m", "etude", "extract", "pictures.npz", "--extractors", "classifier", "--weights")
    words += (f"classifier={network}", "--batch-size", "16", "--store")
    jobs = {"one": 1, "two": 2}
    said = {n: ended(forks.start_ranks(k, *words, n, cwd=tmp_path)) for n, k in jobs.items()}
    assert files(tmp_path / "one") == files(tmp_path / "two") != {}
    assert [status for of in said.values() for status, _ in of] == [0, 0, 0], said
    for rate in ("forward", "statistics", "all"):
        assert re.search(rf"pictures/s: .*{rate} [0-9,.]+", said["two"][0][1])
    assert "pictures.npz in two" in said["two"][0][1] and said["two"][1][1] == ""


def test_processes_agree_on_what_is_missing(forks, network, alone, tmp_path) -> None:
    """Another job writes between their looks: no shard is left out, and none made again."""
    assert ended(pair_of(forks, network, tmp_path, AHEAD="1")) == [(0, ""), (0, "")]
    assert files(tmp_path / "store") == alone
    read = readings(tmp_path / "read")
    of_all = collections.Counter(i for some in [*read[0], *read[1]] for i in range(*some))
    assert of_all == dict.fromkeys(range(COUNT), 1)


@pytest.mark.parametrize(("size", "renames"), [(1, (1, 4, 9)), (2, (1, 2))])
def test_a_killed_extraction_goes_on(forks, network, alone, tmp_path, size, renames) -> None:
    """SIGKILL before or after some rename, again and again; then what is missing is made."""
    (tmp_path / "read").mkdir()
    words = (WORKER, "extract", network, tmp_path / "store", tmp_path / "read")
    whole: dict[str, bytes] = {}
    for number in renames:
        if size == 1:
            statuses = ended([forks.start(*words, DIE_AT=str(number))])
        else:
            ranks = pair_of(forks, network, tmp_path, DIE_AT=str(number), DIES="1")
            while ranks[1].poll() is None:
                time.sleep(0.02)
            ranks[0].kill()  # as a launcher does
            statuses = ended(ranks)[::-1]
        assert statuses[0][0] == KILLED
        found = files(tmp_path / "store")
        assert found.items() >= whole.items()  # nothing that was whole is touched
        assert found.items() <= alone.items()
        whole = found
    assert 0 < len(whole) < len(alone)
    shutil.rmtree(tmp_path / "read")
    if size == 1:
        (tmp_path / "read").mkdir()
        assert ended([forks.start(*words)]) == [(0, "")]
    else:
        assert ended(pair_of(forks, network, tmp_path)) == [(0, ""), (0, "")]
    assert files(tmp_path / "store") == alone
    read = readings(tmp_path / "read")
    of_all = collections.Counter(i for one in read.values() for some in one for i in range(*some))
    assert set(of_all.values()) == {1} and len(of_all) < COUNT


@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_wrong_on_one_is_said_by_both(forks, network, tmp_path, rank) -> None:
    """Else the other would wait for it, and a launcher would start both again, for ever."""
    said = ended(pair_of(forks, network, tmp_path, WRONG=str(rank)))
    assert said == [(2, f"picture {rank * SHARD} cannot be used\n")] * 2


def test_told_to_stop_both_leave_and_the_same_command_goes_on(
    forks, network, alone, tmp_path
) -> None:
    """Only one of two is told; the other does not wait for it for ever."""
    ranks = pair_of(forks, network, tmp_path, PAUSE="0.1")
    while not (tmp_path / "read/1").exists() or not (tmp_path / "read/1").read_text():
        time.sleep(0.01)
    ranks[1].send_signal(signal.SIGTERM)
    (first, said), second = ended(ranks)
    assert (first, said.strip()) == (EXIT_REQUEUE, "stopped: another process was asked to stop")
    assert second == (EXIT_REQUEUE, "stopped: SIGTERM\n")
    found = files(tmp_path / "store")
    assert found.items() < alone.items()
    assert ended(pair_of(forks, network, tmp_path)) == [(0, ""), (0, "")]
    assert files(tmp_path / "store") == alone


def plan_file(path: Path, tiny, root: Path, models: str = "clean rough other", **changes) -> Path:
    """A plan of noisy digits; its store lies in `root`."""
    noise = {"clean": 1, "rough": 60, "other": 20}
    source = f"{tiny.folder / 'digits/monitor'}:"
    fields = {
        "kind": "plan",
        "models": {m: {"kind": "noisy", "source": f"{source}{noise[m]}"} for m in models.split()},
        "data_sets": {"digits": {"kind": "shards", "folder": str(tiny.folder / "train")}},
        "metrics": ["frechet@pixels", {"metric": "prdc@pixels", "options": {"k": 3}}],
        "extractors": {"pixels": {"options": {"input_size": 8}}},
        "samples": 100,
        "image_size": 8,
        "channels": 1,
        "interval": {"replicates": 10},
        "by_group": False,
        "files": [str(WORKERS / "noisy.py")],
        "store": str(root / "store"),
    }
    path.write_text(yaml.safe_dump(fields | changes, sort_keys=False))
    return path


def outcome(root: Path, run: str = "run") -> dict[str, object]:
    """All that a plan leaves: pictures, features and table, without when and by which code."""
    found: dict[str, object] = {f"store/{k}": v for k, v in files(root / "store").items()}
    found |= {f"pictures/{k}": v for k, v in files(root / "runs" / run / "pictures").items()}
    return found | table(root / "runs" / run / "results")


def table(folder: Path) -> dict[str, object]:
    rows = ResultsTable(folder).rows()
    found: dict[str, object] = {
        k: v for k, v in files(folder).items() if k.startswith(("estimates", "protocols", "compl"))
    }
    return found | {str(row): row for row in (replace(row, date="", revision="") for row in rows)}


@pytest.fixture(scope="module")
def planned(forks, tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What a plan leaves that one process carried out in one go."""
    root = tmp_path_factory.mktemp("planned")
    path = plan_file(root / "plan.yaml", tiny, root)
    assert ended([forks.start(WORKER, "plan", path, root / "runs", "run")]) == [(0, "")]
    found = outcome(root)
    rows = [row for row in found.values() if isinstance(row, Row)]
    # Three candidates, a distance and four figures of neighbours.
    assert len(rows) == 15 and len({row.value for row in rows}) > 12
    blocks = [k for k in found if k.startswith("pictures") and k.endswith(".npy")]
    assert len(blocks) == 6
    return found


def test_a_plan_killed_again_and_again_ends_as_if_never(forks, tiny, planned, tmp_path) -> None:
    """SIGKILL at the n-th rename, n rising, until it ends: in drawing, extracting and the table."""
    path = plan_file(tmp_path / "plan.yaml", tiny, tmp_path)
    number, deaths, seen = 4, 0, set()
    while True:
        words = (WORKER, "plan", path, tmp_path / "runs", "run")
        ((status, said),) = ended([forks.start(*words, DIE_AT=str(number))])
        if status == 0:
            break
        assert status == KILLED, said
        seen |= {folder.name for folder in (tmp_path / "runs/run").glob("*/*")}
        deaths, number = deaths + 1, number + 7
    assert deaths >= 4
    assert outcome(tmp_path) == planned


def test_a_pair_killed_in_a_plan_goes_on(forks, tiny, planned, tmp_path) -> None:
    """The second of two processes dies in drawing; one alone ends what they began."""
    path = plan_file(tmp_path / "plan.yaml", tiny, tmp_path)
    words = (WORKER, "plan", path, tmp_path / "runs", "run")
    ranks = ranks_of(forks, *words, DIE_AT="2", DIES="1")
    while ranks[1].poll() is None:
        time.sleep(0.02)
    ranks[0].kill()  # as a launcher does
    assert ended(ranks)[1][0] == KILLED
    assert ended([forks.start(*words)]) == [(0, "")]
    assert outcome(tmp_path) == planned


def test_two_jobs_on_one_table_lose_nothing_and_agree(forks, tiny, planned, tmp_path) -> None:
    """Two plans of their own, started together, that have one model, the store and the table in
    common: all rows are there, as if one job had made them.
    """
    shared = {"table": str(tmp_path / "table")}
    jobs = []
    for name, models in (("first", "clean rough"), ("second", "other rough")):
        path = plan_file(tmp_path / f"{name}.yaml", tiny, tmp_path, models, **shared)
        jobs.append(forks.start(WORKER, "plan", path, tmp_path / "runs", name))
    assert ended(jobs) == [(0, ""), (0, "")]
    expected = {k: v for k, v in planned.items() if not k.startswith(("store", "pictures"))}
    assert table(tmp_path / "table") == expected
    assert {f"store/{k}": v for k, v in files(tmp_path / "store").items()} == {
        k: v for k, v in planned.items() if k.startswith("store")
    }
    written = list(csv.DictReader((tmp_path / "table/results.csv").open()))
    assert sorted(row["model"] for row in written) == sorted(["clean", "other", "rough"] * 5)


def test_one_generator_is_evaluated_by_a_pair_as_by_one(forks, tiny, tmp_path) -> None:
    """`kind: evaluate`: the first one measures, and both end with the same result."""
    save_classifier(
        tmp_path / "net",
        Classifier(ClassifierConfig(channels=(8, 16), num_classes=10), seed=3).eval(),
        8,
        [str(n) for n in range(10)],
    )
    fields = {
        "kind": "evaluate",
        "real": str(tiny.folder / "train"),
        "generated": str(tiny.folder / "monitor"),
        "image_size": 8,
        "extractor": {"kind": "classifier", "weights": str(tmp_path / "net")},
        "metrics": ["frechet", "prdc", "agreement"],
        "interval": {"replicates": 10},
        "store": "store",
    }
    path = tmp_path / "pair.yaml"
    path.write_text(yaml.safe_dump(fields))
    found = {}
    for size in (1, 2):
        root = tmp_path / str(size)
        root.mkdir()
        words = ("-m", "etude", "evaluate", path, "run=run")
        said = ended(forks.start_ranks(size, *words, cwd=root))
        assert [status for status, _ in said] == [0] * size, said
        result = json.loads((root / "runs/run/result.json").read_text())
        found[size] = result["figures"], result["labels"], files(root / "store")
    assert found[1] == found[2] and len(found[1][0]) == 5


@pytest.fixture(scope="module")
def clip(text_models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIP with both towers."""
    import transformers as tf

    folder = tmp_path_factory.mktemp("clip")
    text = tf.CLIPTextConfig.from_pretrained(text_models / "clip_l")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    vision = tf.CLIPVisionConfig(**sizes, num_attention_heads=1, image_size=32, patch_size=16)
    torch.manual_seed(1)
    parts = {"text_config": text.to_dict(), "vision_config": vision.to_dict()}
    model = tf.CLIPModel(tf.CLIPConfig(**parts, projection_dim=10))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = parameter.dim() == 1 and name.endswith("weight")
            parameter.normal_(float(norm), 0.2)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(text_models / "clip_l" / name, folder)
    return folder


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
def test_a_pair_carries_out_a_whole_plan(forks, tiny, clip, tmp_path) -> None:
    """`etude evaluate` with networks and scores by prompt: the same table as that of one process,
    but for the last bits of texts that are encoded beside others.
    """
    changes = {
        "data_sets": {"digits": {"kind": "csv", "folder": str(captioned(tiny, tmp_path / "csv"))}},
        "metrics": ["frechet@clip", {"metric": "prdc@pixels", "options": {"k": 3}}, "clipscore"],
        "extractors": {
            "pixels": {"options": {"input_size": 8}},
            "clip": {"weights": str(clip)},
        },
        "by_group": True,
    }
    found = {}
    for size in (1, 2):
        root = tmp_path / str(size)
        root.mkdir()
        words = ("-m", "etude", "evaluate", plan_file(root / "plan.yaml", tiny, root, **changes))
        ranks = forks.start_ranks(size, *words, f"root={root}/runs", "run=run", cwd=root)
        said = ended(ranks)
        assert [status for status, _ in said] == [0] * size, said
        assert "page " in said[0][1] and "page " not in said[-1][1] or size == 1
        found[size] = outcome(root)
    one, two = found[1], found[2]
    scores = {k for k in one if b"scores of clipscore" in bytes_of(one[k])}
    assert len(scores) == 6
    rows = [{str(r): r for r in of.values() if isinstance(r, Row)} for of in (one, two)]
    assert {r.metric for r in rows[0].values()} > {"clipscore", "recall"}
    assert len(rows[0]) == 3 * 3 * 6  # candidates; all, low and high; figures
    for field, value in rows[0].items():
        assert rows[1][field] == value
    assert one == two


def captioned(tiny, folder: Path) -> Path:
    """Eighty digits as files with captions, in two groups."""
    folder.mkdir()
    data = ShardSet(tiny.folder / "train")
    lines = ["file_name,caption,label,group"]
    for number in range(80):
        sample = data[number]
        (folder / f"{number}.png").write_bytes(sample.data)
        words = f"a picture of the {('cat', 'dog', 'sun', 'moon', 'star')[sample.label % 5]}"
        group = "low" if sample.label < 5 else "high"
        lines.append(f"{number}.png,{words},{sample.label},{group}")
    (folder / "metadata.csv").write_text("\n".join(lines))
    return folder


def bytes_of(value: object) -> bytes:
    return value if isinstance(value, bytes) else b""
