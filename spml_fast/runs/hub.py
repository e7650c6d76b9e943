"""The Hugging Face Hub: model folders sent there and fetched from there. The only file that imports huggingface_hub.

Whoever is logged in is huggingface_hub's own matter (`hf auth login`, or HF_TOKEN): no token passes through here.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spml_fast import __version__
from spml_fast.core.errors import UserError
from spml_fast.core.io import printable
from spml_fast.runs.export_record import card_edited
from spml_fast.runs.layout import ExportLayout

PREFIX = "hf-hub:"
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9_-]|\.(?!\.)){0,94}"
_NAME = re.compile(rf"(?:{_PART}/)?{_PART}")
_LIBRARY: dict[str, Any] = {"library_name": "spml_fast", "library_version": __version__}


def need_hub() -> None:
    """Raise `UserError` unless huggingface_hub is installed."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise UserError("huggingface_hub is not installed; run pip install 'spml_fast[hub]' first")


def check_name(name: str) -> str:
    """A model's name on the Hub, `OWNER/NAME` or `NAME` of one's own; `UserError` for what can be none."""
    if not _NAME.fullmatch(name) or name.endswith((".", "-", ".git")) or "--" in name:
        raise UserError(
            f"{printable(name)!r} is no name of a model on the Hub; give OWNER/NAME of letters, digits, -, _ and ."
        )
    return name


def _reason(error: BaseException) -> str:
    """An error of the library in one line, with what helps."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403) or "token" in type(error).__name__.lower():
        text += "; log in with `hf auth login`, or set HF_TOKEN to a token that may do this"
    return text


def download_model(name: str) -> Path:
    """The folder of a model of the Hub in huggingface_hub's cache, with its weights and their record alone.

    Args:
        name: OWNER/NAME, or OWNER/NAME@REVISION of a branch, a tag or a commit.

    Raises:
        UserError: huggingface_hub is missing, there is no such model, it was not written by `spml-fast push`, or it
            cannot be fetched.
    """
    need_hub()
    repo, _, revision = name.partition("@")
    check_name(repo)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    names = ExportLayout(Path())
    try:
        record = Path(hf_hub_download(repo, names.record.name, revision=revision or None, **_LIBRARY))
        # Of the same commit, whose name the folder has.
        hf_hub_download(repo, names.weights.name, revision=record.parent.name, **_LIBRARY)
    except LocalEntryNotFoundError as error:
        raise UserError(f"{PREFIX}{name} cannot be fetched, and is not in the cache: {_reason(error)}") from error
    except EntryNotFoundError as error:
        raise UserError(
            f"{PREFIX}{name} is no model that spml-fast push wrote (it lacks {names.record.name} or "
            f"{names.weights.name}); timm.create_model opens timm's own"
        ) from error
    except Exception as error:
        # What the library, its network and its server meet has no class in common.
        raise UserError(f"{PREFIX}{name} cannot be fetched: {_reason(error)}") from error
    return record.parent


class HubModel:
    """A model of the Hub to send files to.

    Args:
        name: OWNER/NAME or NAME.
        private: whether it is made private where there is none yet; one that exists stays as it is.

    Attributes:
        name: with its owner.
        url: of its page.

    Raises:
        UserError: it cannot be made: nobody is logged in, no right, no network.
    """

    def __init__(self, name: str, private: bool) -> None:
        need_hub()
        from huggingface_hub import HfApi

        self._api = HfApi(**_LIBRARY)
        try:
            made = self._api.create_repo(check_name(name), private=private, exist_ok=True)
        except Exception as error:
            # As in `download_model`.
            raise UserError(f"{name} cannot be made on the Hub: {_reason(error)}") from error
        self.name, self.url = str(made.repo_id), str(made)

    def others(self, layout: ExportLayout, folder: Path) -> tuple[list[str], bool]:
        """What the model has there that the files of `layout` would replace, and that this program did not write.

        Args:
            layout: of the files to be sent.
            folder: where files of the Hub may be put for the comparison.

        Returns:
            Names of weights and configuration of another origin; and whether the card there is another's, or was
            changed since it was sent.

        Raises:
            UserError: the Hub does not answer.
        """
        try:
            there = set(self._api.list_repo_files(self.name))
            sent = ExportLayout(folder)
            for path in (sent.record, sent.card):
                if path.name in there:
                    self._api.hf_hub_download(self.name, path.name, local_dir=folder)
        except Exception as error:
            # As in `download_model`.
            raise UserError(f"{self.name} cannot be read on the Hub: {_reason(error)}") from error
        names = (layout.weights.name, layout.timm_config.name)
        return [] if sent.record.is_file() else [name for name in names if name in there], card_edited(sent)

    def upload(self, layout: ExportLayout, names: Sequence[str]) -> str:
        """Send files in one commit; returns the address of the model's page.

        Args:
            layout: of the folder.
            names: of its files.

        Raises:
            UserError: the Hub did not take them.
        """
        try:
            self._api.upload_folder(
                repo_id=self.name,
                folder_path=str(layout.folder),
                allow_patterns=list(names),
                # Of an earlier model there: timm would open it with these weights.
                delete_patterns=None if layout.timm_config.is_file() else [layout.timm_config.name],
                commit_message=f"Model written by spml_fast {__version__}",
            )
        except Exception as error:
            # As in `download_model`.
            raise UserError(f"{self.name} was not sent: {_reason(error)}") from error
        return self.url
