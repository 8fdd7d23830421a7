"""UTF-8 text and tables that evaluation reads; called by sets.py, datasets/ and planned/folders.py.

Lines end at a line feed, a carriage return or both. Other characters that Python's
`str.splitlines` cuts at, such as U+2028 and U+0085, are part of a prompt.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from etude.core.errors import UserError

METADATA = "metadata.csv"  # of a folder of pictures: file_name, and what is known of each


def read_text(path: Path) -> str:
    """The UTF-8 text of a file, a byte-order mark left out; `UserError` where it is not."""
    try:
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{path} is not UTF-8 text that can be read; copy it again") from None


def read_lines(path: Path) -> list[str]:
    """The lines of a text file without blanks at their ends, empty ones left out."""
    lines = [line.strip() for line in read_text(path).split("\n")]
    return [line for line in lines if line]


def read_table(
    path: Path, columns: Sequence[str], *, delimiter: str = ",", quoted: bool = True
) -> list[dict[str, str]]:
    """The rows of a table with a header, as column -> text; a missing last cell is "".

    Args:
        columns: those that it must have.
        quoted: whether a quotation mark at the start of a cell is none of its text.

    Raises:
        UserError: it cannot be read, or a column is missing.
    """
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    lines = io.StringIO(read_text(path), newline="")
    table = csv.DictReader(lines, delimiter=delimiter, quoting=quoting, restval="")
    try:
        names = table.fieldnames or ()
        rows = [{name: row[name] or "" for name in names} for row in table]
    except csv.Error as error:
        raise UserError(f"{path}, line {table.reader.line_num}: {error}; copy it again") from None
    missing = [name for name in columns if name not in names]
    if missing:
        raise UserError(
            f"{path} has no column {' or '.join(missing)} in its first line; copy it again"
        )
    return rows


def read_metadata(folder: Path) -> dict[str, dict[str, str]]:
    """What a folder's `metadata.csv` says: file with "/" between folders -> column -> text.

    Rows keep their order; one without a file is none, and of two with the same file the last holds.
    Empty where there is no table.

    Raises:
        UserError: the table cannot be read, has no column file_name, or names no file.
    """
    path = folder / METADATA
    if not path.exists():
        return {}
    rows = read_table(path, ["file_name"])
    found = {Path(row["file_name"]).as_posix(): row for row in rows if row["file_name"]}
    if not found:
        raise UserError(
            f"{path} names no picture below its first line; list the pictures there, or delete it"
            " to take all of the folder"
        )
    return found
