"""Losses of the shipped CPU recipes, cut short, against those that were written down.

A difference means that training changed. Where that was intended, write the new ones with

    python tests/test_golden.py

and give the old value and the reason in the commit.
"""

import json
import tempfile
from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parent / "golden" / "losses.json"
SHORT = ["strategy.kind=local", "data.decoder=torch", "loop.checkpoint.every_images=1000000"]


def measure(data: Path, folder: Path) -> dict[str, dict[str, float]]:
    """Recipe -> images seen -> training loss; on one thread, of a few steps each."""
    from etude.core.log import read_metrics
    from etude.core.recipe import load_recipe
    from etude.jobs import run_recipe

    places = [f"data.shards={data}/train", f"held_out={data}/monitor"]
    latent = [f"autoencoder={folder}/autoencoder", f"latents.folder={folder}/cache"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {}
    try:
        for name, more in (("autoencoder/digits", []), ("ldm/digits", latent)):
            batch = load_recipe(name).loop.global_batch
            steps = [f"loop.images={10 * batch}", f"loop.log_every={2 * batch}"]
            steps += [f"loop.evaluate_every={10 * batch}", "sampler.steps=1"][: 1 + bool(more)]
            recipe = load_recipe(name, [*SHORT, *places, *steps, *more])
            run = run_recipe(recipe, root=folder, name=name.split("/")[0], quiet=True)[0]
            rows = read_metrics(run / "metrics.jsonl", "train")
            found[name] = {str(row["images_seen"]): row["loss"] for row in rows}
    finally:
        torch.set_num_threads(threads)
    return found


def test_losses_of_the_cpu_recipes_are_those_written_down(tiny, tmp_path) -> None:
    expected = json.loads(GOLDEN.read_text())
    found = measure(tiny.folder / "digits", tmp_path)
    assert found.keys() == expected.keys()
    for name, losses in expected.items():
        assert found[name] == pytest.approx(losses, rel=1e-3), name


if __name__ == "__main__":
    from etude.data.digits import write_digits

    with tempfile.TemporaryDirectory() as place:
        values = measure(write_digits(Path(place) / "digits"), Path(place) / "runs")
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(values, indent=2) + "\n")
    print(GOLDEN.read_text())
