"""Protocols and the refusal to compare unlike with unlike; differences with known truth."""

import hashlib
import json
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
import torch

from etude.core.errors import UserError
from etude.evaluation.compare import compare
from etude.evaluation.protocol import Protocol, refuse_difference, stated
from etude.metrics.store import FeatureKey, FeatureStore

PROTOCOL = Protocol(
    extractor="inception",
    extractor_version="1",
    weights_sha256="w",
    resize="r",
    image_size=0,
    fit="as stored",
    rounding="half even",
    dtype="float32",
    reference="real",
    n_real=150,
    n_generated=150,
    k=5,
    guidance="1.5",
    sampler="ddim",
    profile="ema",
    seeds="0",
)


def entry(store: FeatureStore, name: str, rows: np.ndarray, prefix: str = "") -> str:
    key = FeatureKey(name, "inception", "1", "w", "none", "float32", len(rows))
    writer = store.writer(key)
    keys, labels = [f"{prefix}{i}" for i in range(len(rows))], torch.arange(len(rows)) % 3
    writer.write(0, torch.from_numpy(rows).float(), keys, labels, [""] * len(rows))
    writer.finish()
    return key.digest()


def results(store: FeatureStore, prefix: str = "") -> tuple[dict, dict]:
    rng = np.random.default_rng(0)
    real, noise = rng.normal(size=(150, 4)), rng.normal(size=(150, 4))
    sets = [entry(store, "a", noise + 0.5), entry(store, "b", noise + 0.9, prefix)]
    reference = entry(store, "real", real)
    return tuple(
        {
            "protocol": PROTOCOL.as_dict(),
            "generated": {"name": name},
            "metrics": ["frechet", "prdc"],
            "sets": {"real": reference, "generated": digest},
            "figures": {"FID": {"generated": {"value": 1.0 + len(name)}}},
        }
        for name, digest in zip(("a", "b"), sets, strict=True)
    )


def test_the_fingerprint_follows_every_field() -> None:
    prints = {PROTOCOL.fingerprint}
    for field in fields(Protocol):
        value = getattr(PROTOCOL, field.name)
        other = value + 1 if isinstance(value, int) else value + "x"
        prints.add(replace(PROTOCOL, **{field.name: other}).fingerprint)
    assert len(prints) == len(fields(Protocol)) + 1
    assert Protocol.from_dict(PROTOCOL.as_dict()) == PROTOCOL


def test_a_judge_and_a_training_set_count_where_they_were_used() -> None:
    stated = {n: v for n, v in asdict(PROTOCOL).items() if n not in ("judge", "training")}
    plain = hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()
    assert PROTOCOL.fingerprint == plain and Protocol.from_dict(stated) == PROTOCOL
    for name in ("judge", "training"):
        one, two = (replace(PROTOCOL, **{name: value}) for value in "ab")
        assert len({plain, one.fingerprint, two.fingerprint}) == 3
        assert Protocol.from_dict(one.as_dict()) == one
        with pytest.raises(UserError, match=rf"compared: {name} \('a' and 'b'\);"):
            refuse_difference(one, two)
        refuse_difference(one, PROTOCOL)


def test_every_differing_field_is_named() -> None:
    other = replace(PROTOCOL, guidance="4.0", n_generated=50_000)
    with pytest.raises(UserError, match=r"n_generated \(150 and 50000\); guidance \('1.5' and"):
        refuse_difference(PROTOCOL, other)
    with pytest.raises(UserError, match="n_generated") as caught:
        refuse_difference(PROTOCOL, other, ["guidance"])
    assert "guidance" not in str(caught.value)
    refuse_difference(PROTOCOL, other, ["guidance", "n_generated"])
    with pytest.raises(UserError, match="no field steps"):
        refuse_difference(PROTOCOL, PROTOCOL, ["steps"])
    with pytest.raises(UserError, match=r"other fields \(k\)"):
        Protocol.from_dict({n: v for n, v in PROTOCOL.as_dict().items() if n != "k"})


def test_what_a_set_does_not_say_is_not_stated() -> None:
    assert stated({}, "rounding") == stated({"rounding": None}, "rounding") == "not stated"
    assert stated({"sampler": {"b": 1, "a": 2}}, "sampler") == '{"a": 2, "b": 1}'


def test_compare_decides_with_shared_seeds_and_refuses_other_protocols(tmp_path) -> None:
    store = FeatureStore(tmp_path)
    a, b = results(store)
    found = compare(a, b, store=store)
    assert found.paired and found.better("FID") == "a"
    fid = found.differences["FID"]
    assert fid.p_value < 0.01 and fid.p_value <= fid.adjusted_p_value < 0.05
    assert compare(b, a, store=store).better("FID") == "a"
    assert compare(a, b).differences["FID"].value == 0.0
    assert compare(a, b).better("FID") is None
    b["protocol"]["k"] = 3
    with pytest.raises(UserError, match=r"k \(5 and 3\)"):
        compare(a, b, store=store)


def test_pictures_with_other_keys_are_not_paired(tmp_path) -> None:
    store = FeatureStore(tmp_path)
    a, b = results(store, prefix="other")
    found = compare(a, b, store=store)
    assert not found.paired
    assert found.differences["FID"].standard_error > 0
    assert len(found.differences) == 5
