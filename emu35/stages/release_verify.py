"""Checking a release: by itself, and against the run or release it should equal.

Every check runs, whatever the others found, and each is one line of the report. Weights are
compared bit for bit after rounding the reference to the type of the release; logits in fp32, one
model filled twice, so that nothing but the weights can make a difference.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from emu35.checkpoint.dida_adapter import adapter_shapes, adapter_tensors
from emu35.checkpoint.hf import to_hf
from emu35.checkpoint.hf_config import CONFIG_JSON, config_json, read_json
from emu35.checkpoint.manifest import describe_file
from emu35.checkpoint.release_folder import VISION_FILES, damaged_files
from emu35.checkpoint.source import DTYPES, Described, describe, fill, load_model
from emu35.config import LMConfig, Precision
from emu35.errors import DataError, Emu35Error, ReleaseError
from emu35.model.build import build_model
from emu35.model.context import AttentionContext
from emu35.model.logits import vocabulary_logits
from emu35.model.mask import AttentionMask
from emu35.model.names import base_weights
from emu35.model.shapes import hf_shapes, parameter_count
from emu35.model.transformer import Emu35Model
from emu35.parallel.mesh import single_process_mesh
from emu35.tokens.vocabulary import vocabulary_of
from emu35.vision.codec import weights_digest

Message = Callable[[str], object]


@dataclass(kw_only=True, slots=True, frozen=True)
class VerifyOptions:
    """``against`` is a run or a release (``step`` chooses the run's checkpoint).

    ``probe_tokens`` is the length of the two sequences whose logits are compared; 0 skips the
    logits, which need the whole model in fp32. ``transformers`` also compares names and shapes with
    what the transformers library builds for Qwen3, where it is installed.
    """

    release: Path
    against: Path | None = None
    step: int | None = None
    probe_tokens: int = 64
    transformers: bool = False


@dataclass(kw_only=True, slots=True, frozen=True)
class Check:
    """One line of the report; ``measured`` has the figures behind ``detail``, for programs."""

    name: str
    passed: bool
    detail: str
    measured: Mapping[str, Any] = field(default_factory=dict)


def verify(options: VerifyOptions, *, message: Message = print) -> list[Check]:
    """Run every check, tell each result, and return them all.

    Raises:
        ReleaseError: some check failed (all are listed), or there is nothing to check.
        CheckpointError: ``against`` cannot be opened.
    """
    checks = run_checks(options, message=message)
    require_passed(checks, release=options.release)
    return checks


def run_checks(options: VerifyOptions, *, message: Message = print) -> list[Check]:
    """Run every check, tell each result, and return them all, whether they passed or not.

    Raises:
        ReleaseError: there is nothing to check.
        CheckpointError: ``against`` cannot be opened.
    """
    found = describe(options.release, message=message)
    if found.weights is None:
        raise ReleaseError(f"{options.release} is a run; name a release and compare it --against")
    reference = None
    if options.against:
        reference = describe(options.against, step=options.step, message=message)
    checks: list[Check] = []
    for check in _all_checks(found, reference=reference, options=options):
        message(f"{'ok  ' if check.passed else 'FAIL'}  {check.name:<12} {check.detail}")
        checks.append(check)
    return checks


def require_passed(checks: Sequence[Check], *, release: Path) -> None:
    """Raise ReleaseError naming every check of ``release`` that failed."""
    failed = [check for check in checks if not check.passed]
    if failed:
        listed = "; ".join(f"{check.name}: {check.detail}" for check in failed)
        raise ReleaseError(f"{release} failed {len(failed)} of {len(checks)}: {listed}")


def verification_json(checks: Sequence[Check]) -> dict[str, Any]:
    """What ``--json`` prints: ``passed``, the figures, and every check.

    A figure is None where it was not measured: without a reference, or without logits.
    """
    measured: dict[str, Any] = {
        "tensors_compared": None,
        "tensors_different": None,
        "logits_compared": None,
        "logits_equal": None,
        "max_difference": None,
    }
    for check in checks:
        measured |= check.measured
    return {
        "passed": all(check.passed for check in checks),
        **measured,
        "checks": [
            {"name": check.name, "passed": check.passed, "detail": check.detail} for check in checks
        ],
    }


def _all_checks(
    found: Described, *, reference: Described | None, options: VerifyOptions
) -> Iterator[Check]:
    assert found.weights is not None
    yield _files(found)
    yield _config(found)
    names = _names(found)
    yield names
    yield _types(found)
    if found.copy_weights is not None:
        yield _adapters(found)
    if options.transformers:
        yield _against_transformers(found)
    if not names.passed:
        return
    if reference is None:
        if options.probe_tokens:
            logits_NV = _logits(
                _fp32_model(found, state=found.weights), length=options.probe_tokens
            )
            finite = bool(logits_NV.isfinite().all())
            yield Check(name="logits", passed=finite, detail=_shape_text(logits_NV, "finite"))
        return
    yield from _description(found, reference=reference)
    same_form = _architecture(found) == _architecture(reference)
    if same_form and found.tokenizer_ids == reference.tokenizer_ids:
        yield from _values(found, reference=reference, length=options.probe_tokens)


def _files(found: Described) -> Check:
    if found.facts is None:
        return Check(name="files", passed=True, detail="no emu35.json, hashes not compared")
    problems = damaged_files(found.path, facts=found.facts)
    size = sum(entry.size for entry in found.facts.files.values())
    good = f"{len(found.facts.files)} files, {size:,} bytes, all hashes as recorded"
    return Check(name="files", passed=not problems, detail="; ".join(problems) or good)


def _config(found: Described) -> Check:
    """Every official field is there, and says what this version would write."""
    content = read_json(found.path / CONFIG_JSON)
    expected = config_json(
        found.config,
        vocabulary=vocabulary_of(found.tokenizer),
        precision=found.precision,
        image_area=int(found.extra["image_area"]),
    )
    problems = [
        f"{name} is {content[name]!r}, not {expected[name]!r}"
        for name in sorted(_DECISIVE)
        if name in content and content[name] != expected[name]
    ]
    if found.facts:  # others may rely on the official defaults where those are right
        problems += [f"no {name}" for name in expected if name not in content]
    good = f"{len(content)} fields, vocabulary {found.vocabulary_size:,}"
    return Check(name="config", passed=not problems, detail="; ".join(problems) or good)


_DECISIVE = frozenset(
    {"vocab_size", "tie_word_embeddings", "torch_dtype"}
    | {f"{name}_token_id" for name in ("pad", "bos", "eos", "img", "boi", "eoi", "eol", "eof")}
)
"""Fields that do not simply repeat what the architecture was read from."""


def _names(found: Described) -> Check:
    """Key set and shapes: the official loader would initialise a missing tensor silently."""
    assert found.weights is not None
    expected = hf_shapes(found.config, vocabulary_size=found.vocabulary_size)
    problems = _compare_shapes(found.weights.shapes, expected=expected)
    count = parameter_count(found.config, vocabulary_size=found.vocabulary_size)
    good = f"{len(expected)} tensors, {count:,} parameters"
    return Check(name="tensors", passed=not problems, detail=_few(problems) or good)


def _types(found: Described) -> Check:
    assert found.weights is not None
    stored = str(found.weights.dtype).removeprefix("torch.")
    return Check(name="type", passed=stored in ("float32", "bfloat16"), detail=stored)


def _adapters(found: Described) -> Check:
    """Key set, shapes and type of the adapters of noisy copies."""
    assert found.copy_adapters is not None
    assert found.copy_weights is not None
    expected = adapter_shapes(found.config, adapters=found.copy_adapters)
    problems = _compare_shapes(found.copy_weights.shapes, expected=expected)
    if found.copy_weights.dtype != DTYPES[found.precision]:
        problems.append(f"their type is {found.copy_weights.dtype}, not that of the weights")
    good = f"{len(expected)} tensors of noisy copies, rank {found.copy_adapters.rank}"
    return Check(name="adapters", passed=not problems, detail=_few(problems) or good)


def _against_transformers(found: Described) -> Check:
    try:
        from transformers import Qwen3Config, Qwen3ForCausalLM
    except ImportError:
        detail = "transformers is not installed; pip install 'emu35[verify]'"
        return Check(name="transformers", passed=False, detail=detail)
    config = found.config
    with torch.device("meta"):
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=found.vocabulary_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.ffn_hidden_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_attention_heads,
                num_key_value_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                max_position_embeddings=config.max_position_embeddings,
                tie_word_embeddings=False,
            )
        )
    assert found.weights is not None
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = _compare_shapes(found.weights.shapes, expected=expected)
    good = "names and shapes equal those of Qwen3ForCausalLM"
    return Check(name="transformers", passed=not problems, detail=_few(problems) or good)


def _description(found: Described, *, reference: Described) -> Iterator[Check]:
    same = _architecture(found) == _architecture(reference)
    detail = "same fields" if same else f"{found.config} here, {reference.config} there"
    yield Check(name="architecture", passed=same, detail=detail)
    ours, theirs = found.tokenizer_ids, reference.tokenizer_ids
    detail = "same ids" if ours == theirs else f"{ours} here, {theirs} there"
    yield Check(name="tokenizer", passed=ours == theirs, detail=detail)
    yield _vision(found, reference=reference)


def _architecture(described: Described) -> LMConfig:
    """How attention is computed is not part of what a model is."""
    return replace(described.config, attention_backend=LMConfig().attention_backend)


def _vision(found: Described, *, reference: Described) -> Check:
    here, there = found.vision_folder, reference.vision_folder
    if here is None or there is None:
        same = here is None and there is None
        detail = "none" if same else f"{here} here, {there} there"
        return Check(name="vision", passed=same, detail=detail)
    try:
        if not all((folder / name).is_file() for folder in (here, there) for name in VISION_FILES):
            # Of another layout, or another package: what both say of their weights.
            same = weights_digest(here) == weights_digest(there)
            detail = "same weights" if same else "the weights differ"
            return Check(name="vision", passed=same, detail=detail)
        different = [
            name
            for name in VISION_FILES
            if describe_file(here, name=name) != describe_file(there, name=name)
        ]
    except (OSError, DataError) as error:
        return Check(name="vision", passed=False, detail=str(error))
    detail = f"{', '.join(different)} differ" if different else "same files"
    return Check(name="vision", passed=not different, detail=detail)


def _values(found: Described, *, reference: Described, length: int) -> Iterator[Check]:
    """Weights bit for bit, then logits."""
    assert found.weights is not None
    try:
        state, adapters = _tensors(reference)
    except Emu35Error as error:
        yield Check(name="weights", passed=False, detail=str(error))
        return
    rounded = _Rounded(state=state, dtype=DTYPES[found.precision])
    different = [
        name
        for name, tensor in rounded.items()
        if not torch.equal(found.weights[name].to(tensor.dtype), tensor.cpu())
    ]
    detail = f"{_few(different)} differ" if different else f"{len(rounded)} tensors bit-equal"
    measured = {"tensors_compared": len(rounded), "tensors_different": len(different)}
    yield Check(name="weights", passed=not different, detail=detail, measured=measured)
    if found.copy_weights is not None or adapters:
        yield _same_adapters(found, reference=reference, adapters=adapters)
    if not length:
        return
    model = _fp32_model(found, state=found.weights)
    ours_NV = _logits(model, length=length)
    fill(model, state=rounded)
    yield _compare_logits(ours_NV, _logits(model, length=length))


def _compare_logits(ours_NV: torch.Tensor, theirs_NV: torch.Tensor) -> Check:
    equal = torch.equal(ours_NV, theirs_NV)
    gap = (ours_NV - theirs_NV).abs().max().item()
    # NaN is no JSON; then all that is known is that they differ.
    known = gap if math.isfinite(gap) else None
    return Check(
        name="logits",
        passed=equal,
        detail=_shape_text(ours_NV, "exactly equal") if equal else f"differ by up to {gap:.3g}",
        measured={
            "logits_compared": ours_NV.numel(),
            "logits_equal": equal,
            "max_difference": known,
        },
    )


@dataclass(kw_only=True, slots=True, frozen=True)
class _Rounded(Mapping[str, torch.Tensor]):
    """``state`` in another type, converted only as it is asked for: two copies of a large model
    would not fit."""

    state: Mapping[str, torch.Tensor]
    dtype: torch.dtype

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.state[name].to(self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


def _same_adapters(
    found: Described, *, reference: Described, adapters: Mapping[str, torch.Tensor]
) -> Check:
    """How they are built and what they were trained on, then every tensor, bit for bit."""
    here, there = (
        (each.copy_adapters, each.noise if each.copy_adapters else None)
        for each in (found, reference)
    )
    if here != there:
        return Check(name="same adapters", passed=False, detail=f"{here} here, {there} there")
    assert found.copy_weights is not None
    rounded = _Rounded(state=adapters, dtype=DTYPES[found.precision])
    different = [
        name
        for name, tensor in rounded.items()
        if name not in found.copy_weights or not torch.equal(found.copy_weights[name], tensor.cpu())
    ]
    good = f"{len(rounded)} tensors of noisy copies bit-equal"
    detail = f"{_few(different)} differ" if different else good
    return Check(name="same adapters", passed=not different, detail=detail)


def _tensors(
    reference: Described,
) -> tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]:
    """The reference's weights under official names, and its adapters of noisy copies."""
    if reference.weights is not None:
        return reference.weights, reference.copy_weights or {}
    model = load_model(reference, precision=reference.precision)
    weights = to_hf(
        base_weights(model),
        config=reference.config,
        vocabulary_size=reference.vocabulary_size,
    )
    return weights, adapter_tensors(model)


def _fp32_model(found: Described, *, state: Mapping[str, torch.Tensor]) -> Emu35Model:
    single_process_mesh()
    model = build_model(
        found.config, vocabulary_size=found.vocabulary_size, precision=Precision.fp32
    )
    fill(model, state=state)
    return model.eval()


@torch.no_grad()
def _logits(model: Emu35Model, *, length: int) -> torch.Tensor:
    """Logits of a fixed batch: two sequences of ids spread over the whole vocabulary, the second
    one made of two documents. Shape [2 * length, vocabulary]."""
    device = next(model.parameters()).device
    length = min(length, model.lm_config.max_position_embeddings)
    index_BS = torch.arange(2 * length, device=device).view(2, length)
    tokens_BS = (index_BS * 7919 + 13) % model.vocabulary_size
    start_BS = torch.zeros_like(tokens_BS)
    start_BS[1, length // 2 :] = length // 2
    rows_S = torch.arange(length, device=device)
    context = AttentionContext(positions_BS=rows_S - start_BS, mask=AttentionMask.causal(start_BS))
    hidden_SBH = model(tokens_BS, context=context)
    hidden_NH = hidden_SBH.transpose(0, 1).reshape(-1, hidden_SBH.shape[-1])
    return vocabulary_logits(model, hidden_NH=hidden_NH)


def _compare_shapes(
    found: Mapping[str, tuple[int, ...]], *, expected: Mapping[str, tuple[int, ...]]
) -> list[str]:
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unknown" for name in found if name not in expected]
    problems += [
        f"{name} has shape {found[name]}, not {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    return problems


def _few(problems: list[str]) -> str:
    more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
    return "; ".join(problems[:5]) + more


def _shape_text(logits_NV: torch.Tensor, words: str) -> str:
    return f"{logits_NV.shape[0]} x {logits_NV.shape[1]:,} values in fp32, {words}"
