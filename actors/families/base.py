"""The base class of model families: layout, tiling, prompt and image embedding.

A family turns (image sizes, messages) into integers before any pixel or weight is touched.
`layout` is the only place where token arithmetic exists; tiling, prompts, admission and planning use it.

To add a family: subclass `Family`, give `image_defaults`, `placeholder`, `layout`, `tile`, `model_inputs`
and `embed_images`, and register it in `actors/families/__init__.py`. One that takes videos gives
`video_token_id`, `video_placeholder`, `check_videos`, `layout_video` and `tile_frame` as well.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jinja2 import TemplateError, TemplateSyntaxError
from numpy.typing import NDArray
from torch import Tensor

from actors.errors import RowError
from actors.families.checkpoint import Checkpoint, CheckpointError
from actors.families.messages import Kind, Message, parts, slots, text_message, texts
from actors.images.normalize import PixelTable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Size = tuple[int, int]
"""(height, width) in pixels."""
VideoSize = tuple[int, int, int]
"""(frames, height, width) of a video; height and width of its first frame."""


class PromptError(RowError):
    """Messages that cannot become a prompt: the row's error kind "prompt"."""

    def __init__(self, message: str) -> None:
        super().__init__("prompt", message)


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """How one picture is cut and what it costs; integers only, known from its size alone."""

    size: Size
    """(height, width) of the decoded image, or of a video's first frame."""
    grid: tuple[int, int]
    """Rows and columns of tiles; each family documents what (0, 0) and (1, 1) mean to it."""
    tiles: int
    """Leading dimension of `Family.tile`'s result; of a video its frames, a tile each."""
    tokens: int
    """Placeholder ids in the prompt == features of the picture."""
    frames: int = 0
    """Frames of a video; 0 for an image."""

    @property
    def kind(self) -> Kind:
        """The message slot that the picture fills."""
        return "video" if self.frames else "image"


class Family(ABC):
    """One checkpoint's image and text rules: tokenizer, processor config, chat template; no weights."""

    name: ClassVar[str]
    """The config's model_type."""
    image_defaults: ClassVar[Mapping[str, Any]]
    """The stock image processor's defaults, for fields that the checkpoint omits or sets to null."""

    tile_shape: tuple[int, int, int]
    """(3, h, w) of every tile."""
    image_token_id: int
    """The id that holds an image feature's place."""
    video_token_id: int | None = None
    """The id that holds a video feature's place; None for a family that takes no videos."""
    eos_token_ids: frozenset[int]
    """Ids that end a caption."""
    stop_strings: tuple[str, ...]
    """Texts that end a caption, beside those that a request names."""
    max_positions: int
    """Prompt and caption together fit in this many positions of the text model."""
    placeholder: str
    """What the chat template writes for one image."""
    video_placeholder: str | None = None
    """What the chat template writes for one video."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.path = checkpoint.path
        self.tokenizer = checkpoint.tokenizer
        self.chat_template = checkpoint.chat_template
        self.eos_token_ids = checkpoint.eos_token_ids
        self.stop_strings = checkpoint.stop_strings
        self.image_token_id = int(checkpoint.config.image_token_id)
        self.max_positions = int(checkpoint.config.get_text_config().max_position_embeddings)
        given = {key: value for key, value in checkpoint.image_processor.items() if value is not None}
        self.image_config: dict[str, Any] = {**self.image_defaults, **given}
        self.normalize = PixelTable.of(self.image_config)
        """uint8 pixels -> normalised floats on their device."""

    @abstractmethod
    def layout(self, sizes: Sequence[Size]) -> tuple[ImageLayout, ...]:
        """Lay out all images of ONE row, from their (height, width); () for a text-only row.

        Raises RowError for a size that the model cannot take.
        """

    @abstractmethod
    def tile(self, image: Tensor, layout: ImageLayout) -> Tensor:
        """Cut one image: uint8 `[3, H, W]` -> uint8 `[layout.tiles, *tile_shape]`, on the CPU."""

    @abstractmethod
    def model_inputs(self, pixels: Tensor, layouts: Sequence[ImageLayout]) -> dict[str, Tensor]:
        """What the stock `generate` takes beside `input_ids` for ONE row; pixel values in float32.

        `pixels`: uint8 `[sum of tiles, *tile_shape]` on the model's device, images in order. At least one
        image: a text-only row has no image inputs.
        """

    @abstractmethod
    def embed_images(
        self, model: PreTrainedModel, pixels: Tensor, layouts: Sequence[ImageLayout]
    ) -> list[Tensor]:
        """Encode pictures, of one row or of many: one `[tokens, D]` tensor each, in order.

        `pixels` as in `model_inputs`. Raises ValueError naming the picture whose feature count is not its
        `layout.tokens`.
        """

    def check_chat(self) -> None:
        """Raises CheckpointError unless the chat template is there and can be parsed."""
        try:
            self.render([text_message("user", "?")])
        except PromptError as error:
            reason = error.__cause__  # other refusals are of this message, not of a row's
            if isinstance(reason, TemplateSyntaxError):
                raise CheckpointError(f"{self.path}: the chat template is not valid: {reason}") from None

    def check_videos(self) -> None:
        """Raises CheckpointError, saying why, unless rows of this checkpoint may have videos."""
        raise CheckpointError(f"{self.path}: {self.name} takes no videos; LLaVA-OneVision does")

    def layout_video(self, size: VideoSize) -> ImageLayout:
        """Lay out one video. Asked only of a family that passes `check_videos`."""
        raise NotImplementedError

    def tile_frame(self, frame: Tensor) -> Tensor:
        """Make the one tile of a video's frame: uint8 `[3, H, W]` -> uint8 `[*tile_shape]`, on the CPU."""
        raise NotImplementedError

    def row_layouts(self, sizes: Sequence[Size | VideoSize]) -> tuple[ImageLayout, ...]:
        """The layouts of ONE row's pictures, images and videos in any order; raises as `layout` does."""
        images = iter(self.layout([(size[0], size[1]) for size in sizes if len(size) == 2]))
        return tuple(self.layout_video(size) if len(size) == 3 else next(images) for size in sizes)

    def image_ids(self, layout: ImageLayout) -> NDArray[np.int32]:
        """Ids that stand in the prompt for one picture: its placeholders and any markers among them."""
        token = self.video_token_id if layout.frames else self.image_token_id
        return np.full(layout.tokens, token, dtype=np.int32)

    def placeholders(self, ids: NDArray[np.int32]) -> NDArray[np.int64]:
        """Where in a prompt features go, of images and videos: int64 `[P]`, ascending."""
        found = ids == self.image_token_id
        if self.video_token_id is not None:
            found |= ids == self.video_token_id
        return np.flatnonzero(found)

    def appearance(self, ids: NDArray[np.int32], layouts: Sequence[ImageLayout]) -> list[int]:
        """Indices of `layouts` in the order in which `prompt` put them into `ids`.

        A chat template may move images before videos whatever the message says, so only the ids know.
        """
        tokens: dict[Kind, int | None] = {"image": self.image_token_id, "video": self.video_token_id}
        places = {kind: np.flatnonzero(ids == token) for kind, token in tokens.items()}
        passed: dict[Kind, int] = {"image": 0, "video": 0}
        first: list[int] = []
        for layout in layouts:
            first.append(int(places[layout.kind][passed[layout.kind]]))
            passed[layout.kind] += layout.tokens
        return sorted(range(len(layouts)), key=first.__getitem__)

    @property
    def anchor(self) -> str:
        """Text tokenised in place of `placeholder`; exactly one of its ids is `image_token_id`."""
        return self.placeholder

    @property
    def reserved(self) -> tuple[str, ...]:
        """Strings that users' text must not contain, because they would be taken for an image or video."""
        return tuple(string for string in (self.placeholder, self.video_placeholder) if string)

    def prompt(self, messages: Sequence[Message], layouts: Sequence[ImageLayout]) -> NDArray[np.int32]:
        """Messages and their pictures' layouts -> int32 `[L]` prompt ids; images and videos fill the slots of
        their kind, each in order.

        The chat is rendered and tokenised once, unexpanded; image ids are then spliced in. The result equals
        the stock `processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)`.
        Raises PromptError.
        """
        self._check(messages, layouts)
        text = self.render(messages)
        for kind, count in _counts(layouts):
            string = self.placeholder if kind == "image" else self.video_placeholder
            found = 0 if string is None else text.count(string)
            if found != count:
                raise PromptError(f"the rendered chat holds {string!r} {found} times for {count} {kind}s")
        ids = self.tokenize(text.replace(self.placeholder, self.anchor))
        return self.splice(ids, layouts)

    def render(self, messages: Sequence[Message]) -> str:
        """The chat as text, one placeholder a picture, open for the assistant's answer."""
        if self.chat_template is None:
            raise CheckpointError(
                f"{self.path}: the checkpoint has no chat template "
                "(chat_template.jinja, chat_template.json or in tokenizer_config.json)"
            )
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=True,
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise PromptError(f"the chat template refuses the messages: {error}") from error
        return str(text)

    def tokenize(self, text: str) -> NDArray[np.int32]:
        """Text -> int32 ids. Special tokens are added unless the text begins with BOS, as stock does it."""
        bos = self.tokenizer.bos_token
        add_special_tokens = bos is None or not text.startswith(bos)
        ids = self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        return np.asarray(ids, dtype=np.int32)

    def splice(self, ids: NDArray[np.int32], layouts: Sequence[ImageLayout]) -> NDArray[np.int32]:
        """Replace the i-th placeholder of each kind in `ids` by the `image_ids` of its i-th layout."""
        for kind, count in _counts(layouts):
            found = int((ids == (self.image_token_id if kind == "image" else self.video_token_id)).sum())
            if found != count:
                raise PromptError(f"the text makes {found} {kind} placeholders for {count} {kind}s")
        images = iter([layout for layout in layouts if not layout.frames])
        videos = iter([layout for layout in layouts if layout.frames])
        spliced: list[NDArray[np.int32]] = []
        start = 0
        for place in self.placeholders(ids):
            layout = next(videos if ids[place] == self.video_token_id else images)
            spliced += [ids[start:place], self.image_ids(layout)]
            start = int(place) + 1
        return np.concatenate([*spliced, ids[start:]])

    def decode(self, token_ids: Sequence[int] | NDArray[np.int32]) -> str:
        """Generated ids -> caption text, special tokens skipped."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def token_id(self, token: str) -> int:
        """The id of a token of the vocabulary; CheckpointError where the tokenizer does not know it."""
        found = self.tokenizer.convert_tokens_to_ids(token)
        if found is None or (found == self.tokenizer.unk_token_id and token != self.tokenizer.unk_token):
            raise CheckpointError(f"{self.path}: the tokenizer has no token {token!r}")
        return int(found)

    def require_token(self, token: str, kind: Kind) -> None:
        """Refuse a checkpoint whose tokenizer and config disagree on the image or video token."""
        configured = self.image_token_id if kind == "image" else self.video_token_id
        if self.token_id(token) != configured:
            raise CheckpointError(
                f"{self.path}: {token!r} is id {self.token_id(token)} to the tokenizer, "
                f"but config.json's {kind} token is {configured}"
            )

    def _check(self, messages: Sequence[Message], layouts: Sequence[ImageLayout]) -> None:
        if not messages:
            raise PromptError("there are no messages")
        kinds = ("image",) if self.video_token_id is None else ("image", "video")
        for part in (part for message in messages for part in parts(message)):
            if part.get("type") not in kinds and not isinstance(part.get("text"), str):
                held = "s, ".join(kinds)
                raise PromptError(f"a message holds {held}s and texts, not {str(part)[:200]}")
        for kind, count in _counts(layouts):
            if slots(messages, kind) != count:
                raise PromptError(
                    f"the messages have {slots(messages, kind)} {kind} slots for {count} {kind}s"
                )
        for text in texts(messages):
            for string in self.reserved:
                if string in text:
                    raise PromptError(f"the text contains {string!r}, which is a placeholder to this model")


def _counts(layouts: Sequence[ImageLayout]) -> list[tuple[Kind, int]]:
    """How many pictures of each kind there are."""
    videos = sum(layout.frames > 0 for layout in layouts)
    return [("image", len(layouts) - videos), ("video", videos)]


def check_features(features: Sequence[Tensor], layouts: Sequence[ImageLayout]) -> list[Tensor]:
    """`features`, once each picture's count is its layout's `tokens`; else ValueError naming the picture."""
    for index, (feature, layout) in enumerate(zip(features, layouts, strict=True)):
        if feature.shape[0] != layout.tokens:
            raise ValueError(
                f"{layout.kind} {index} ({layout.size[0]} x {layout.size[1]}) has {feature.shape[0]} features for "
                f"{layout.tokens} placeholder tokens: processor config and model config disagree"
            )
    return list(features)


def vision_dtype(model: PreTrainedModel) -> torch.dtype:
    """The dtype that pixel values must have: the vision tower's, or the model's where it has no tower."""
    inner = getattr(model, "model", model)
    tower = getattr(inner, "vision_tower", None)
    return next((model if tower is None else tower).parameters()).dtype
