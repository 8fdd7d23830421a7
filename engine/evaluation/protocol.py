"""What fixes an evaluation's numbers; made by plan.py, enforced by compare.py.

Figures of two generators mean something side by side only when everything else is equal: the
features, how pictures reach the network, the reference, the numbers of pictures, k and the way the
pictures were drawn. A protocol states all of it and has a fingerprint.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields

from etude.core.errors import UserError

NOT_STATED = "not stated"
_OPTIONAL = {"judge", "training"}  # left out where unused, so that such results stay comparable


@dataclass(frozen=True)
class Protocol:
    """Everything beside the generator's weights that a figure depends on.

    Attributes:
        extractor, extractor_version, weights_sha256: the features.
        resize: how pictures reach the network's size.
        image_size, fit: the size real pictures were brought to first (0: as stored) and how.
        rounding: how generated pictures became 8-bit.
        dtype: of the features.
        reference: fingerprint of the real set.
        n_real, n_generated: numbers of pictures.
        k: neighbours of precision, recall, density and coverage.
        guidance, sampler, profile, seeds: how the pictures were drawn, as JSON text.
        judge: weights of the classifier that labelled pictures, where it is not the extractor.
        training: fingerprint of the training pictures, where they were compared with.
    """

    extractor: str
    extractor_version: str
    weights_sha256: str
    resize: str
    image_size: int
    fit: str
    rounding: str
    dtype: str
    reference: str
    n_real: int
    n_generated: int
    k: int
    guidance: str
    sampler: str
    profile: str
    seeds: str
    judge: str = ""
    training: str = ""

    @property
    def fingerprint(self) -> str:
        """sha256 over every field that is stated, 64 hex digits."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()

    def as_dict(self) -> dict:
        """Plain values for result.json, without what no figure used."""
        unused = {name for name in _OPTIONAL if not getattr(self, name)}
        return {name: value for name, value in asdict(self).items() if name not in unused}

    @classmethod
    def from_dict(cls, data: dict) -> "Protocol":
        """Read back from result.json."""
        known = {field.name for field in fields(cls)}
        if set(data) | _OPTIONAL != known:
            odd = ", ".join(sorted((set(data) | _OPTIONAL) ^ known))
            raise UserError(f"the result's protocol has other fields ({odd}); evaluate again")
        return cls(**data)


def stated(drawn: dict, key: str) -> str:
    """A set's own statement as text, or `NOT_STATED`."""
    if key not in drawn or drawn[key] is None:
        return NOT_STATED
    value = drawn[key]
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def refuse_difference(a: Protocol, b: Protocol, except_fields: Iterable[str] = ()) -> None:
    """`UserError` naming every field in which two protocols differ.

    A judge or training set that only one of them used is no difference: no figure of both has it.

    Args:
        except_fields: fields whose difference is what the comparison is about, for example
            ("guidance",) in a sweep.
    """
    unknown = set(except_fields) - {field.name for field in fields(Protocol)}
    if unknown:
        raise UserError(f"a protocol has no field {', '.join(sorted(unknown))}")
    one, other = (asdict(protocol) for protocol in (a, b))
    differing = [
        f"{name} ({one[name]!r} and {other[name]!r})"
        for name in one
        if one[name] != other[name]
        and name not in except_fields
        and (name not in _OPTIONAL or (one[name] and other[name]))
    ]
    if differing:
        raise UserError(
            f"these results have different protocols and cannot be compared: "
            f"{'; '.join(differing)}; evaluate both the same way"
        )
