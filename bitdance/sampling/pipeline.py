"""The pipeline: class names or ids -> images. Commands, jobs, previews and evaluation all sample through it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bitdance.config import (
    RELEASED_MODELS,
    AutoencoderConfig,
    BitDanceConfig,
    Precision,
    Preset,
    SamplingDefaults,
    Weights,
)
from bitdance.data.class_names import ClassNames, names_of
from bitdance.data.crops import center_crop, normalize, to_array
from bitdance.data.decoding import to_rgb
from bitdance.models.autoencoder import Autoencoder
from bitdance.models.packed_linear import packed_linears
from bitdance.models.quantizer import pack
from bitdance.models.tokens import grid_from_tokens, tokens_from_grid
from bitdance.models.transformer import BitDance
from bitdance.runtime.devices import choose_device, exact_float32, uses_bf16
from bitdance.runtime.errors import UserError, did_you_mean, is_out_of_memory, printable
from bitdance.sampling.sampler import (
    CompiledFunctions,
    SamplingConfig,
    StepCallback,
    complete_config,
    decode_pixels,
    describe_compiler_error,
    find_compiler_problem,
    is_compiler_error,
    padded_size,
    sample_noise,
    sample_tokens,
)
from bitdance.weights import weights_file
from bitdance.weights.layout import CFG_SCALE, TOKENIZER_DIGEST, WeightsFile
from bitdance.weights.resolve import find_autoencoder_of, find_weights, list_checkpoints

Output = Literal["pil", "np", "pt"]

MAX_CHUNK_PIXELS = 256**2
"""Pixels that a CPU decodes at once: more are not faster and take 0.3 GB for each 256 x 256."""


class SampleBatch(NamedTuple):
    """A batch of samples.

    Attributes:
        pixels: (B, H, W, 3) uint8.
        bits: (B, N, C / 8) uint8, the tokens in their order, packed by `bitdance.models.quantizer.pack`.
        halved: whether the tokens were sampled in smaller batches, for lack of memory.
    """

    pixels: np.ndarray
    bits: np.ndarray
    halved: bool


@dataclasses.dataclass(repr=False)
class Pipeline:
    """A model and its autoencoder, ready to sample; `load_pipeline` makes one from files.

    Attributes:
        model, autoencoder: in evaluation mode, on one device, in the dtype to compute in.
        name: used in the names of result files.
        defaults: sampling settings for those that a call does not give.
        functions: compiled ones, see `compile`.
        files: of the model and of the autoencoder, if they were loaded from files.
        weights: which ones of the files were asked for, see `load_pipeline`.

    Raises:
        UserError: the autoencoder does not have the model's number of bits per token.
    """

    model: BitDance
    autoencoder: Autoencoder
    name: str = "model"
    defaults: SamplingDefaults = dataclasses.field(default_factory=SamplingDefaults)
    functions: CompiledFunctions | None = None
    files: tuple[pathlib.Path, pathlib.Path] | None = None
    weights: Weights | None = None
    _fitting_batch: int = dataclasses.field(default=sys.maxsize, init=False)
    _fitting_chunk: int = dataclasses.field(default=sys.maxsize, init=False)

    def __post_init__(self) -> None:
        check_bits(self.model.config, self.autoencoder.config)

    def __repr__(self) -> str:
        size, dtype = f"{self.image_size} px, {len(self.classes)} classes", str(self.dtype).removeprefix("torch.")
        return f"Pipeline({self.name!r}, {size}, {dtype} on {self.device})"

    @property
    def device(self) -> torch.device:
        """The device that samples."""
        return self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of matrix products."""
        return self.model.dtype

    @property
    def image_size(self) -> int:
        """Height and width of the images in pixels."""
        return self.model.config.grid * self.autoencoder.config.down_size

    @functools.cached_property
    def classes(self) -> ClassNames:
        """Names of the classes: the model's own, ImageNet's for 1000 classes without names, else numbers."""
        return names_of(self.model.config.class_names, self.model.config.num_classes)

    def __call__(
        self,
        classes: str | int | Sequence[str | int],
        *,
        seed: int = 0,
        cfg_scale: float | None = None,
        num_steps: int | None = None,
        solver: str | None = None,
        preset: Preset | None = None,
        batch_size: int = 100,
        chunk_size: int | None = None,
        output: Output = "pil",
        callback: StepCallback | None = None,
        known: Tensor | None = None,
        **others: Any,
    ) -> Any:
        """Samples one image per class given.

        Args:
            classes: names, ids or WordNet ids; repeat one for several images of it.
            seed: 0 <= seed < 2**32. Image i depends on the seed, i, its class and the settings, not on `batch_size`
                (except for rounding).
            cfg_scale, num_steps, solver: guidance scale, steps and name of the diffusion head's solver; by default
                those of the preset, or else `defaults`.
            preset: `exact`, solver, number of steps and first tokens as published (`share_first` off), or `fast`, fewer
                steps of a better solver.
            batch_size: images sampled at once.
            chunk_size: images decoded at once, 0 for all; by default that of `defaults`.
            output: `pil` for a list of PIL images, `np` for an array, `pt` for a tensor on the pipeline's device,
                both (B, H, W, 3) uint8.
            callback: called after each autoregressive step of each batch with (steps done, steps in total, tokens so
                far (B, n, C)).
            known: (B, N, C), tokens that are not sampled, as `complete` makes them.
            others: further fields of `bitdance.sampling.sampler.SamplingConfig`.

        Raises:
            UserError: an unknown class, or a setting that is out of range.
            ValueError: `known` has another shape.
            TypeError: an unknown option.
        """
        fields = SamplingConfig.__dataclass_fields__.keys()
        if unknown := others.keys() - fields:
            hint = did_you_mean(min(unknown), [*inspect.signature(self).parameters, *fields]).strip()
            raise TypeError(f"there is no option {min(unknown)!r}" + (f" ({hint})" if hint else ""))
        seed, batch_size = _as_number(seed), _as_number(batch_size)
        cfg_scale, num_steps, chunk_size = map(_as_number, (cfg_scale, num_steps, chunk_size))
        config = self.sampling_config(cfg_scale, num_steps, solver=solver, preset=preset, **others)
        labels = self._find_labels(classes)
        _check_output(output)
        if callback is not None and not callable(callback):
            raise UserError(f"callback={callback!r} is no function: it is called after each autoregressive step.")
        shape = (len(labels), self.model.config.num_tokens, self.model.config.bits)
        if known is not None and (not isinstance(known, Tensor) or known.shape != shape):
            raise ValueError(f"known must be a tensor of shape {shape}, tokens of +-1 and 0 for those to sample.")
        batches = [
            self.generate(
                list(rows),
                labels[rows.start : rows.stop],
                config,
                seed,
                chunk_size,
                callback,
                known=None if known is None else known[rows.start : rows.stop],
            ).pixels
            for rows in split_batches(len(labels), batch_size)
        ]
        return self._convert(np.concatenate(batches), output)

    def _find_labels(self, classes: Any) -> list[int]:
        classes = getattr(classes, "tolist", lambda: classes)()  # of an array or a tensor
        one = isinstance(classes, str) or not isinstance(classes, Iterable)
        labels = self.classes.find_all([classes] if one else classes)
        if not labels:
            raise UserError("no classes are given: name at least one.")
        return labels

    def complete(
        self,
        images: Any,
        classes: str | int | Sequence[str | int],
        *,
        keep_rows: int | None = None,
        keep_tokens: int | None = None,
        mask: Tensor | np.ndarray | None = None,
        candidates: int = 1,
        **settings: Any,
    ) -> Any:
        """Keeps some tokens of images and samples the others.

        The order of the tokens is that of the model: a token depends on the kept ones before it, not on those after.
        So a completion continues what is above it; within a mask it does not fit to what is below.

        Args:
            images: as for `encode`, or their bits (B, C, h, w), +-1, floating point.
            classes: one for all images, or one for each; another one than that of the image changes it half-way.
            keep_rows: rows of the token grid to keep, from the top, a multiple of the model's patch.
            keep_tokens: tokens to keep from the start of the model's order, a multiple of P.
            mask: (h, w) bool, true for tokens to keep, anywhere. With P > 1 the tokens of a step that is kept in part
                are sampled together, without regard to those kept.
            candidates: completions of each image, with different noise.
            settings: as of a call: `seed`, `cfg_scale`, `output` and so on.

        Returns:
            B x `candidates` images, those of an image one after the other; each decoded as a whole, so kept parts are
            reconstructions.

        Raises:
            UserError: not exactly one of `keep_rows`, `keep_tokens` and `mask` is given, or it does not fit the model.
            ValueError: images of another kind or size than the model's, or bits that are not +-1.
        """
        config = self.model.config
        is_bits = isinstance(images, Tensor) and images.is_floating_point()
        bits = images if is_bits else self.encode(images)
        if bits.shape[1:] != (config.bits, config.grid, config.grid):
            size = f"{config.bits} bits for each of {config.grid} x {config.grid} tokens"
            raise ValueError(f"the model has {size}, the images give {tuple(bits.shape[1:])}: use images of its size.")
        if is_bits:
            _check_signs(bits)
        labels = self._find_labels(classes)
        if len(labels) not in (1, len(bits)):
            raise UserError(f"{len(labels)} classes for {len(bits)} images: give one class, or one for each image.")
        candidates = _as_number(candidates)
        if type(candidates) is not int or candidates < 1:
            raise UserError(f"candidates={candidates} is invalid: it must be an integer of at least 1.")
        tokens = tokens_from_grid(bits.to(self.device).float(), config.patch)  # (B, N, C)
        kept = kept_tokens(config, keep_rows, keep_tokens, mask).to(self.device)  # (N,)
        known = torch.where(kept[:, None], tokens, 0).repeat_interleave(candidates, 0)
        labels = labels * len(bits) if len(labels) == 1 else labels
        return self([label for label in labels for _ in range(candidates)], known=known, **settings)

    def sampling_config(
        self, cfg_scale: float | None = None, num_steps: int | None = None, **others: Any
    ) -> SamplingConfig:
        """Completes sampling settings with a `preset` and the pipeline's defaults; see `sampler.complete_config`."""
        return complete_config(self.defaults, cfg_scale=cfg_scale, num_steps=num_steps, **others)

    def generate(
        self,
        sample_ids: Sequence[int],
        labels: Sequence[int],
        config: SamplingConfig,
        seed: int = 0,
        chunk_size: int | None = None,
        callback: StepCallback | None = None,
        report: Callable[[str], object] = print,
        known: Tensor | None = None,
    ) -> SampleBatch:
        """Samples one batch.

        What does not fit into memory is sampled in halves, and decoded in smaller chunks.

        Args:
            sample_ids: B ids, from which the noise follows.
            labels: B classes.
            config: sampling settings.
            seed: 0 <= seed < 2**32.
            chunk_size: images decoded at once, 0 for all; by default that of `defaults`.
            callback: called after each autoregressive step.
            report: called with a message when a batch or a chunk is halved.
            known: (B, N, C), tokens that are not sampled, see `sampler.sample_tokens`.

        Raises:
            UserError: a setting is out of range.
            ValueError: ids or labels are out of range, or none, or of different numbers.
        """
        chunk_size = self.defaults.chunk_size if chunk_size is None else chunk_size
        if not isinstance(chunk_size, int) or chunk_size < 0:
            raise UserError(f"chunk_size={chunk_size} is invalid: it must be at least 0 (0 decodes a batch at once).")
        num_classes = self.model.config.num_classes
        if not 0 < len(sample_ids) == len(labels):
            raise ValueError(f"{len(sample_ids)} sample ids and {len(labels)} labels: give one label for each id.")
        if not all(0 <= number < 2**32 for number in sample_ids) or not all(0 <= c < num_classes for c in labels):
            raise ValueError(f"sample ids must be below 2**32, and labels below {num_classes}, and not negative.")

        def sample(rows: range) -> Tensor:
            ids, classes = ([values[row] for row in rows] for values in (sample_ids, labels))
            given = None if known is None else known[rows.start : rows.stop]
            return self._with_functions(functools.partial(self._sample, ids, classes, given, config, seed, callback))

        def report_halves(rows: range) -> None:
            report(
                f"not enough memory for {len(rows)} images at once: images {sample_ids[rows[0]]} to "
                f"{sample_ids[rows[-1]]} are sampled in two halves, which can differ by rounding from a whole batch."
            )

        tokens = self._sample_in_parts(sample, range(len(sample_ids)), report_halves)
        pixels = self.decode_tokens(tokens, chunk_size, report)
        halved = len(sample_ids) > self._fitting_batch
        return SampleBatch(pixels.cpu().numpy(), pack(tokens).cpu().numpy(), halved)

    def _sample_in_parts(
        self, sample: Callable[[range], Tensor], rows: range, report: Callable[[range], object]
    ) -> Tensor:
        """Samples tokens, in two halves if the batch does not fit into memory; the size that did not is remembered."""
        size = len(rows)
        if size <= self._fitting_batch:
            try:
                return sample(rows)
            except (RuntimeError, MemoryError) as error:
                if size == 1 or not is_out_of_memory(error):
                    raise
            # Outside of the except clause, where the exception and with it the frames that hold the tensors are gone.
            self._release_memory()
            self._fitting_batch = size - size // 2
        report(rows)
        halves = rows[: size // 2], rows[size // 2 :]
        return torch.cat([self._sample_in_parts(sample, half, report) for half in halves])

    def _sample(
        self,
        sample_ids: Sequence[int],
        labels: Sequence[int],
        known: Tensor | None,
        config: SamplingConfig,
        seed: int,
        callback: StepCallback | None,
        functions: CompiledFunctions | None,
    ) -> Tensor:
        """Samples tokens (B, N, C); a batch for compiled functions is padded to a size that they know."""
        size = len(sample_ids)
        padding = padded_size(size, functions.sizes) - size if functions else 0
        padded = [
            torch.tensor([*part, *[part[-1]] * padding], dtype=torch.int64, device=self.device)
            for part in (sample_ids, labels)
        ]
        if known is not None:
            known = torch.cat([known, known[-1:].expand(padding, -1, -1)]).to(self.device)
        noise_fn = sample_noise(self.model, seed, padded[0], config.num_draws)
        report = (lambda i, steps, tokens: callback(i, steps, tokens[:size])) if callback and padding else callback
        # The compiler packs the weights itself.
        with packed_linears(self.model) if functions is None else contextlib.nullcontext():
            tokens = sample_tokens(self.model, padded[1], noise_fn, config, report, functions, known)[:size]
        if functions:
            functions.sizes.add(size + padding)
        return tokens

    def save_pretrained(self, folder: str | os.PathLike[str], metrics: Mapping[str, float] | None = None) -> None:
        """Writes the networks in float32, samples and a model card to a folder, from which `load_pipeline` loads them.

        The networks of a pipeline that was loaded from files are read from them again, since its own can be in bf16.

        Args:
            folder: a new or empty one, or one that this function wrote.
            metrics: for the card, by name.

        Raises:
            UserError: the folder holds something else, or cannot be written.
        """
        from bitdance.sampling.pretrained import save_pretrained

        save_pretrained(self, pathlib.Path(os.path.expanduser(folder)), metrics)

    def push_to_hub(self, name: str, private: bool = False, metrics: Mapping[str, float] | None = None) -> str:
        """Uploads what `save_pretrained` writes to a repository on the Hugging Face hub and returns its address.

        Args:
            name: `user/name`; `load_pipeline` takes it too. The repository is made if it does not exist.
            private: whether a new repository is visible to its owner alone.
            metrics: for the card, by name.

        Raises:
            UserError: the hub cannot be reached, or refuses; it needs a token in HF_TOKEN, or `hf auth login`.
        """
        from bitdance.sampling.pretrained import push_to_hub

        return push_to_hub(self, name, private, metrics)

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **options: Any) -> Pipeline:
        """Calls `load_pipeline`."""
        return load_pipeline(name, **options)

    @torch.no_grad()
    def encode(self, images: Any) -> Tensor:
        """Encodes images to bits.

        Args:
            images: a PIL image or a list of them, scaled and cropped to `image_size`, without regard to EXIF data
                (`PIL.ImageOps.exif_transpose`); or uint8 pixels as an array or a tensor, (H, W, 3) or (B, H, W, 3),
                whose sides are multiples of the autoencoder's `cell_size`.

        Returns:
            (B, C, h, w) +-1, float32, on the pipeline's device.

        Raises:
            ValueError: pixels of another shape or dtype.
        """
        if isinstance(images, Image.Image):
            images = [images]
        if not isinstance(images, np.ndarray | Tensor):
            is_list = isinstance(images, list | tuple) and len(images) > 0
            if not is_list or not all(isinstance(image, Image.Image) for image in images):
                raise ValueError("images must be PIL images, or pixels as an array or a tensor; open files first.")
            images = np.stack([to_array(center_crop(to_rgb(image), self.image_size)) for image in images])
        if isinstance(images, np.ndarray):
            images = torch.from_numpy(images.copy()) if images.dtype == np.uint8 else images
        if images.dtype != torch.uint8 or 0 in images.shape:
            raise ValueError(
                f"pixels must be uint8 of shape (H, W, 3) or (B, H, W, 3), not {images.dtype} of {images.shape}."
            )
        pixels = images.to(self.device)
        pixels = pixels[None] if pixels.ndim == 3 else pixels
        with exact_float32():
            return self.autoencoder.encode(normalize(pixels).to(self.dtype)).float()

    def decode(self, bits: Tensor | np.ndarray, output: Output = "pil") -> Any:
        """Decodes bits (B, C, h, w), +-1, to images; `output` as in a call.

        Raises:
            ValueError: another shape, or other values.
            UserError: `output` is unknown.
        """
        _check_output(output)
        if not isinstance(bits, np.ndarray | Tensor):
            raise ValueError("bits must be a tensor or an array.")
        bits = torch.as_tensor(bits.copy() if isinstance(bits, np.ndarray) else bits)
        depth = self.autoencoder.config.bits
        if bits.ndim != 4 or bits.shape[1] != depth or not len(bits) or bits[0, 0].numel() < 2:
            raise ValueError(f"bits must have shape (B, {depth}, h, w), not {tuple(bits.shape)}.")
        _check_signs(bits)
        return self._convert(self._decode(bits).cpu().numpy(), output)

    def decode_tokens(self, tokens: Tensor, chunk_size: int = 0, report: Callable[[str], object] = print) -> Tensor:
        """Decodes tokens (B, N, C), +-1, to (B, H, W, 3) uint8.

        Args:
            tokens: as sampled.
            chunk_size: images decoded at once, at most; 0 for all. On a CPU a chunk has at most `MAX_CHUNK_PIXELS`, and
                one that does not fit into memory is halved.
            report: called with a message when a chunk is halved.
        """
        bits = grid_from_tokens(tokens, self.model.config.patch)  # (B, C, h, w)
        size = min(limit_chunk(chunk_size or len(bits), self.image_size, self.device), self._fitting_chunk, len(bits))
        parts: list[Tensor] = []
        start = 0
        while start < len(bits):
            chunk = bits[start : start + size]
            count = len(chunk)
            if self.functions:  # to a size that is compiled
                padding = padded_size(count, self.functions.chunks) - count
                chunk = F.pad(chunk, (0, 0) * (bits.ndim - 1) + (0, padding))
            try:
                parts.append(self._with_functions(functools.partial(self._decode, chunk))[:count])
                start += count
                continue
            except (RuntimeError, MemoryError) as error:
                if len(chunk) == 1 or not is_out_of_memory(error):
                    raise
            self._release_memory()
            size = self._fitting_chunk = len(chunk) // 2
            report(f"not enough memory to decode {len(chunk)} images at once: {size} are decoded at once from now on.")
        return torch.cat(parts)

    def _release_memory(self) -> None:
        if self.functions is not None:  # CUDA graphs hold the memory of the sizes that they were made for
            torch._dynamo.reset()
            self.functions = self.functions.renewed()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @torch.no_grad()
    def _decode(self, bits: Tensor, functions: CompiledFunctions | None = None) -> Tensor:
        parameter = next(self.autoencoder.parameters())
        decode = functions.decode if functions else decode_pixels
        with exact_float32():
            pixels = decode(self.autoencoder, bits.to(parameter.device, parameter.dtype))
        if functions:
            functions.chunks.add(len(bits))
        return pixels

    def _with_functions(self, call: Callable[[CompiledFunctions | None], Tensor]) -> Tensor:
        """Calls a function with the compiled functions, and again without them where compiling fails."""
        try:
            return call(self.functions)
        except Exception as error:
            if self.functions is None or not is_compiler_error(error):
                raise
            problem = describe_compiler_error(error)
            print(f"bitdance: the sampler runs uncompiled, since compiling failed: {problem}", file=sys.stderr)
        self.functions = None
        return call(None)

    def _convert(self, pixels: np.ndarray, output: Output) -> Any:
        if output == "pil":
            return [Image.fromarray(image) for image in pixels]
        return torch.from_numpy(pixels).to(self.device) if output == "pt" else pixels

    def compile(self, mode: str = "auto") -> None:
        """Compiles sampler and decoder with `torch.compile`, at the next call and for each size of a batch or chunk.

        All calls have to come from one thread: CUDA graphs belong to theirs.

        On a CPU the weights become constants: later changes of them have no effect. Where there is no compiler, nothing
        is compiled, and a message says so.

        Args:
            mode: `default`, `reduce-overhead` (with CUDA graphs; on a CPU the same as `default`), or `auto`: the latter
                on a CUDA GPU, otherwise nothing is compiled.

        Raises:
            UserError: unknown mode.
        """
        if mode not in ("auto", "default", "reduce-overhead"):
            raise UserError(f"mode={mode!r} is unknown: use auto, default or reduce-overhead.")
        if mode == "auto":
            if self.device.type != "cuda":
                return
            mode = "reduce-overhead"
        if problem := find_compiler_problem(self.device):
            advice = "install a C++ compiler, and Triton for a GPU, to compile it"
            print(f"bitdance: the sampler runs uncompiled ({problem}): {advice}.", file=sys.stderr)
            return
        if os.environ.get("RANK", "0") == "0":  # all processes compile
            print("bitdance: the first batch of each size takes longer, up to minutes, to compile.", file=sys.stderr)
        self.functions = CompiledFunctions(self.model, mode)


def kept_tokens(
    config: BitDanceConfig,
    keep_rows: int | None = None,
    keep_tokens: int | None = None,
    mask: Tensor | np.ndarray | None = None,
) -> Tensor:
    """Returns which tokens a completion keeps, (N,) bool in the model's order; arguments as of `Pipeline.complete`.

    Raises:
        UserError: not exactly one is given, or it does not fit the model.
    """
    grid, p = config.grid, config.parallel_num
    if sum(value is not None for value in (keep_rows, keep_tokens, mask)) != 1:
        raise UserError("say what to keep: give either `keep_rows`, `keep_tokens` or `mask`.")
    if mask is not None:
        with contextlib.suppress(TypeError, ValueError, RuntimeError):  # of what is no array, or one of strings
            mask = torch.as_tensor(mask)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (grid, grid):
            raise UserError(f"the mask must be bool of shape ({grid}, {grid}), one value for each token.")
        return tokens_from_grid(mask[None, None], config.patch)[0, :, 0]
    name, value, most, unit = "keep_rows", keep_rows, grid, config.patch
    if keep_tokens is not None:
        name, value, most, unit = "keep_tokens", keep_tokens, config.num_tokens, p
    if not isinstance(value, int) or not 0 <= value < most or value % unit:
        multiple = f", a multiple of {unit}, since the model samples {p} tokens at once" if unit > 1 else ""
        raise UserError(f"{name}={value} is invalid: it must be an integer from 0 to {most - unit}{multiple}.")
    return torch.arange(config.num_tokens) < (value if keep_rows is None else value * grid)


def limit_chunk(size: int, image_size: int, device: torch.device) -> int:
    """Returns the images to decode at once on a device, at most `size`."""
    return min(size, max(1, MAX_CHUNK_PIXELS // image_size**2)) if device.type == "cpu" else size


def check_bits(model: BitDanceConfig, autoencoder: AutoencoderConfig) -> None:
    """Raises a `UserError` unless a model and an autoencoder have the same number of bits per token."""
    if model.bits != autoencoder.bits:
        problem = f"the model has {model.bits} bits per token and the autoencoder {autoencoder.bits}"
        raise UserError(f"{problem}: use the autoencoder that the model was trained with.")


def _as_number(value: Any) -> Any:
    """Returns a number of NumPy as one of Python, and anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def _check_signs(bits: Tensor) -> None:
    if bits.dtype == torch.bool or not bool((bits.abs() == 1).all()):
        raise ValueError("bits must be -1 or +1: take the sign of what you have.")


def _check_output(output: str) -> None:
    if output not in ("pil", "np", "pt"):
        raise UserError(f"output={output!r} is unknown: use pil, np or pt.")


def load_pipeline(
    name: str | os.PathLike[str] = "demo",
    *,
    autoencoder: str | os.PathLike[str] | None = None,
    weights: Weights | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | Precision = "auto",
) -> Pipeline:
    """Loads a model with its autoencoder.

    Args:
        name: `demo`, a released model such as `BitDance-B-16X` (downloaded if it is not there), the folder of a
            training run, a file of weights, or a repository on the hub, `user/name`.
        autoencoder: likewise; by default the one inside the model's file, beside it, or of its training run.
        weights: `ema` or `model` (raw); by default the EMA if the file has one.
        device: such as `cpu` or `cuda:1`; by default a GPU if there is one.
        dtype: of matrix products; `auto` is bfloat16 on hardware that computes with it, else float32.

    Raises:
        UserError: a file is missing or damaged, or model and autoencoder do not belong together.
    """
    contents = weights_file.read(find_weights(name))
    if autoencoder is not None:
        source = weights_file.read(find_weights(autoencoder, "autoencoder"))
    elif "autoencoder" in contents.states:
        source = contents
    else:
        source = weights_file.read(find_autoencoder_of(contents.path))
    device = choose_device(str(device) if isinstance(device, torch.device) else device)
    dtype = dtype if isinstance(dtype, torch.dtype) else choose_dtype(dtype, device)
    if not dtype.is_floating_point:
        raise UserError(f"dtype={dtype} is invalid: it must be a floating-point type, such as torch.bfloat16.")
    model = weights_file.load_model(contents, weights, dtype)
    network = weights_file.load_autoencoder(source, dtype)
    if os.path.isdir(os.path.expanduser(name)) and contents.path in list_checkpoints(contents.path.parent).values():
        print(f"bitdance: {name} is not finished: {contents.path.name} is used.", file=sys.stderr)
    stem = contents.path.stem
    if stem == "model":  # of a run or a repository: all have a file of this name
        is_local = os.path.exists(os.path.expanduser(name))
        stem = (contents.path.parent.absolute() if is_local else pathlib.Path(name)).name or stem
    name = f"{stem}-{contents.choose_weights(weights)}"
    defaults, files = sampling_defaults(contents), (contents.path, source.path)
    pipeline = Pipeline(model.to(device), network.to(device), name, defaults, files=files, weights=weights)
    trained_with = contents.metadata.get(TOKENIZER_DIGEST)
    if trained_with and trained_with != weights_file.tokenizer_digest(source):
        print(
            f"bitdance: warning: {contents.path} was not trained with {source.path}: unless it is the same "
            "autoencoder in another precision, the images will be noise.",
            file=sys.stderr,
        )
    if device.type == "cpu":
        network.prepare_for_cpu()
    return pipeline


def sampling_defaults(contents: WeightsFile) -> SamplingDefaults:
    """Returns the published settings of a released file, or else the defaults with the file's own guidance scale.

    Raises:
        UserError: the guidance scale is no number.
    """
    released = {release.file.lower(): release for release in RELEASED_MODELS.values()}.get(contents.path.name.lower())
    if released:
        return released.sampling
    scale = contents.metadata.get(CFG_SCALE, str(SamplingDefaults.cfg_scale))
    try:
        defaults = SamplingDefaults(float(scale))
        complete_config(defaults)
        return defaults
    except ValueError:
        raise UserError(f"{contents.path} gives the guidance scale {printable(scale)!r}: convert it again.") from None


def choose_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Returns the dtype of matrix products without gradients; `auto` is bfloat16 on hardware that has it."""
    return torch.bfloat16 if uses_bf16(precision, device) else torch.float32


def split_batches(num_images: int, batch_size: int) -> Iterator[range]:
    """Splits a job into fixed batches: ranges of sample ids, of which the last may be shorter.

    Raises:
        UserError: a count is not positive.
    """
    for name, value in (("num_images", num_images), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{name}={value} is invalid: it must be at least 1, an integer.")
    for start in range(0, num_images, batch_size):
        yield range(start, min(start + batch_size, num_images))
