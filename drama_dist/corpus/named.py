"""Collections by name, as huggingface:BeIR/scifact: where they lie, and fetching them there, once.

Does not cover the members of named suites (fetch.py), nor what a name means to a library (hub.py, ir_collections.py).
"""

from __future__ import annotations

from pathlib import Path

from drama_dist.corpus import hub, ir_collections
from drama_dist.corpus.beir_folder import NoSuchCollection, Tables, write_once
from drama_dist.encoder.failures import reason
from drama_dist.encoder.sources import cache_folder
from drama_dist.labels import HUB, is_named
from drama_dist.run.progress import say
from drama_dist.settings import SettingsError


def folder_of(path: str) -> Path:
    """A path as it is; of a name the folder that it is fetched to: CACHE/collections/LIBRARY/OWNER--NAME..."""
    if not is_named(path):
        return Path(path)
    library, _, name = path.partition(":")
    return cache_folder() / "collections" / library / name.replace("/", "--")


def is_missing(path: str) -> bool:
    """Whether this is a name, of which nothing has been fetched."""
    return is_named(path) and not folder_of(path).exists()


def check_named(setting: str, name: str, judged: bool) -> None:
    """Raise SettingsError where a collection by name, which is missing, cannot be fetched as it is named.

    judged: it has to have queries and judgements. Of ir_datasets this does not tell whether its sources can be reached.
    """
    if not _found(setting, name).judgements and judged:
        raise SettingsError(f"{setting}={name}: has no queries with judgements, so nothing can be evaluated on it")


def fetch_named(setting: str, name: str) -> None:
    """Fetch a collection that is missing. Raises SettingsError as `check_named` does, and where it breaks off."""
    folder, tables = folder_of(name), _found(setting, name)
    say(f"{folder}: fetching {tables.origin}")
    try:
        write_once(folder, tables)
    except Exception as error:  # which types the network libraries raise changes between versions
        raise _unfetchable(setting, name, error) from error


def _found(setting: str, name: str) -> Tables:
    try:
        return hub.tables_of(name) if name.startswith(HUB) else ir_collections.tables_of(name)
    except NoSuchCollection as problem:
        raise SettingsError(f"{setting}={name}: {problem}") from None
    except Exception as error:  # as in `fetch_named`
        raise _unfetchable(setting, name, error) from error


def _unfetchable(setting: str, name: str, error: Exception) -> SettingsError:
    page = hub.page_of(name) if name.startswith(HUB) else ir_collections.PAGE
    return SettingsError(
        f"{setting}={name}: is not in {folder_of(name)}, and cannot be fetched: {reason(error).rstrip('.')}. Fetch it "
        f"where that is possible ({page}) and copy that folder here, or put it there as a BEIR folder: corpus.jsonl "
        "and, where there are any, queries.jsonl and qrels/test.tsv; $DRAMA_CACHE moves ~/.cache/drama-dist elsewhere"
    )
