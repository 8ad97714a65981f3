"""Settings under random damage: whatever is given, settings come out that can be written and read, or one sentence."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from drama_dist.settings import SettingsError, as_dict, read_settings, write_settings

CONFIGS = [path.read_text("utf-8") for path in sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))]
WORDS = r""": # - ? ??? ! *a % @ ` ' " [ ] { } , --- ... ~ null no nan .inf -1 0 1e400 1e-320 9e18 0x1F 1_0 ${x} \ / ..
~/x = "\ud800" "\U99999999" true [] {} float32 auto drama 99999999999999999999"""
BLANKS = (" ", " \t\n", ": ", " #", "- ", "!!int ", "&a ", "<<: ", "[1, 2]", "{a: 1}", "a\nb")
NASTY = (*WORDS.split(), *BLANKS, "\x00", "\x85", "\u2028", "\ufeff", "\ud800", "\U0001f600")
LONG = ["9" * 5000, "[" * 3000, "{a: " * 1500, "x" * 100_000, "- " * 2000]


def damaged(text: str, rng: random.Random) -> bytes:
    lines = text.splitlines()
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(lines))
        line = lines[at]
        cut = rng.randrange(len(line) + 1)
        key, colon, _ = line.partition(":")
        lines[at] = rng.choice(
            (
                line[:cut] + rng.choice(NASTY) + line[cut:],
                line[:cut] + line[cut + rng.randrange(1, 4) :],
                f"{key}{colon} {rng.choice(NASTY)}",
                f"{key}{colon} {rng.choice(NASTY)}{rng.choice(NASTY)}",
                rng.choice(lines),
                f"{line}\n{rng.choice(lines)}",
                f"{key}{colon} {rng.choice(LONG)}" if rng.random() < 0.03 else line.swapcase(),
                " " + line,
            )
        )
    data = bytearray("\n".join(lines).encode("utf-8", "surrogatepass"))
    if rng.random() < 0.1:
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def outcome(file: Path, overrides: list[str]) -> str:
    """refused, or read: then it is the same when written and read again."""
    try:
        settings = read_settings(file, overrides)
    except SettingsError as error:
        lines = str(error).splitlines()
        assert 1 <= len(lines) <= 3
        for line in lines:
            assert line.startswith((str(file), "override ")) and line.isprintable() and len(line) < 1000, line
        return "refused"
    again = file.with_name("again.yaml")
    write_settings(settings, again)
    assert read_settings(again) == settings
    return "read"


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_file_is_read_or_refused_in_a_sentence(tmp_path: Path, seed: int) -> None:
    rng = random.Random(f"file {seed}")
    outcomes: Counter[str] = Counter()
    for _ in range(400):
        (tmp_path / "s.yaml").write_bytes(damaged(rng.choice(CONFIGS), rng))
        outcomes[outcome(tmp_path / "s.yaml", rng.choice(([], ["corpus.path=x"], ["corpus.path=x"])))] += 1
    assert min(outcomes["read"], outcomes["refused"]) > 20, outcomes


def test_a_random_override_is_taken_or_refused_in_a_sentence(tmp_path: Path) -> None:
    rng = random.Random("override")
    file = tmp_path / "s.yaml"
    file.write_text("llm: m\ncorpus: {path: x}\n", "utf-8")
    whole = as_dict(read_settings(file))
    keys = [key for key in whole if not isinstance(whole[key], dict)]
    keys += [f"{section}.{key}" for section in whole if isinstance(whole[section], dict) for key in whole[section]]
    outcomes: Counter[str] = Counter()
    for _ in range(1000):
        overrides = []
        for _ in range(rng.choice((1, 1, 2))):
            key, value = rng.choice(keys), "".join(rng.choices(NASTY, k=rng.choice((1, 1, 2))))
            if rng.random() < 0.1:
                key = rng.choice((key[:-1], key.upper(), key.split(".")[0], rng.choice(NASTY), key + ".x", "x." + key))
            if rng.random() < 0.02:
                value = rng.choice(LONG)
            overrides.append(rng.choice((f"{key}={value}", f"{key}={value}", f"{key}=[{value}]", f"{key}{value}")))
        outcomes[outcome(file, overrides)] += 1
    assert min(outcomes["read"], outcomes["refused"]) > 20, outcomes
