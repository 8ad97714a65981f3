"""Which writer the settings mean, and how it is to draw."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryFile

from drama_dist.augment.sources.prompts import FORM, Form
from drama_dist.augment.writers.endpoint import EndpointWriter
from drama_dist.augment.writers.local import LocalWriter
from drama_dist.augment.writers.writer import Sampling, Writer
from drama_dist.encoder.failures import named_by
from drama_dist.labels import is_endpoint
from drama_dist.settings import AugmentSettings, Settings, SettingsError


def writer_of(settings: Settings) -> Writer:
    """The LLM of augment.writer, or the one that is pruned; not loaded yet."""
    name = settings.writer
    if is_endpoint(name):
        kept = settings.augment.answers or Path(settings.run) / "answers"
        return EndpointWriter(name, settings.augment.requests, Path(kept))
    return LocalWriter(name, settings.trust_remote_code)


def check_writer(settings: Settings, max_new_tokens: int) -> None:
    """Raise SettingsError if the LLM cannot write, or its answers cannot be kept where they are to be."""
    augment = settings.augment
    if augment.answers is not None:
        with named_by("augment.answers", augment.answers):
            Path(augment.answers).mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=augment.answers).close()
    if augment.json_answers and not is_endpoint(settings.writer):
        raise SettingsError(
            "augment.json_answers=true: only an endpoint can be held to a JSON schema, and "
            f"{settings.writer} runs in this process; set it to false, or augment.writer to URL#MODEL"
        )
    with named_by("llm" if augment.writer is None else "augment.writer", settings.writer):
        writer_of(settings).check(sampling_of(augment, settings.seed, FORM, max_new_tokens))


def sampling_of(
    augment: AugmentSettings, seed: int, form: Form | None = None, max_new_tokens: int | None = None
) -> Sampling:
    """How texts are written.

    form: of the answers, which augment.json_answers asks for. max_new_tokens: where it is not augment.max_new_tokens,
    which queries take.
    """
    most = max_new_tokens or augment.max_new_tokens
    return Sampling(augment.temperature, augment.top_p, most, seed, form if augment.json_answers else None)
