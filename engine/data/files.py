"""Folders that appear whole or not at all; called by everything in this room that writes one."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from etude.core.errors import UserError
from etude.core.files import flush_folder


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends without an exception.

    Raises:
        UserError: `folder` already holds something.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty; type another folder or remove it first")
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        draft.chmod(0o755)
        yield draft
        for path in sorted(draft.rglob("*")):
            flush_folder(path)  # the same call forces a file's content to the disk
        flush_folder(draft)
        os.replace(draft, folder)
        flush_folder(folder.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
