"""The base class of torchmetrics: the only file of the engine that imports it.

Called by `metrics/wrappers/torchmetrics.py`, which nothing else imports: torchmetrics is optional.
"""

from etude.core.errors import UserError

try:
    from torchmetrics import Metric
    from torchmetrics.utilities import dim_zero_cat
except ModuleNotFoundError as error:
    raise UserError(
        f"torchmetrics cannot be imported ({error}); type: pip install torchmetrics"
    ) from error

__all__ = ["Metric", "dim_zero_cat"]
