"""Checkpoints load alike from both file layouts, fast, without ray or torchvision, or say why not."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor

from actors.families import (
    FAMILIES,
    CheckpointError,
    HubError,
    PromptError,
    load_family,
    load_model,
    text_message,
    user_message,
)
from tests.actors.families import small
from tests.actors.families.conftest import Subject
from tests.actors.families.oracle import assert_equals_stock, lay_out, noise, write_checkpoint
from tests.checkpoints import untrained

TILED = [small.llava_onevision, small.aya_vision]


def edit(path: Path, **changes: object) -> None:
    """Set keys of a JSON file; a key set to `...` is removed."""
    value = json.loads(path.read_text()) if path.exists() else {}
    value = {key: item for key, item in {**value, **changes}.items() if item is not ...}
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("build", TILED)
def test_both_layouts_load_equal(build: Callable[[], small.Parts], tmp_path: Path) -> None:
    _, config, processor = build()
    messages = [text_message("system", "Be brief."), user_message("What?", images=1)]
    images = [noise(300, 500)]
    for layout in ("4.x", "5.x"):
        path = write_checkpoint(tmp_path / layout, config, processor, layout)
        assert_equals_stock(load_family(path), processor, messages, images)
    files = {path.name for path in (tmp_path / "4.x").iterdir()}
    assert "preprocessor_config.json" in files and "chat_template.jinja" not in files


@pytest.mark.parametrize("build", TILED)
def test_omitted_fields_take_the_stock_defaults(build: Callable[[], small.Parts], tmp_path: Path) -> None:
    """The oldest layout: no processor config, and an image processor config of little more than its type."""
    _, config, processor = build()
    write_checkpoint(tmp_path, config, processor, "4.x")
    fields: dict[str, object] = {"image_std": [0.5, 0.5, 0.5], "resample": 2}
    if build is small.aya_vision:
        fields |= {"size": {"height": 364, "width": 364}}
    else:
        fields |= {"image_grid_pinpoints": [[384, 384], [384, 768], [768, 384]], "crop_size": None}
    path = tmp_path / "preprocessor_config.json"
    path.unlink()
    edit(path, image_processor_type=type(processor.image_processor).__name__, **fields)
    edit(tmp_path / "processor_config.json", vision_aspect_ratio=..., image_token=..., start_of_img_token=...)
    stock = AutoProcessor.from_pretrained(tmp_path)
    family = load_family(str(tmp_path))
    for size in ((300, 500), (900, 200)):
        assert_equals_stock(family, stock, [user_message("What?", images=1)], [noise(*size)])
    assert_equals_stock(family, stock, [user_message("What?", images=2)], [noise(30, 50), noise(70, 50)])


def test_tile_tokens_come_from_the_model_where_the_processor_is_silent(tmp_path: Path) -> None:
    _, config, processor = small.llava_onevision()
    expected = load_family(write_checkpoint(tmp_path, config, processor)).layout([(300, 500)])
    edit(tmp_path / "processor_config.json", num_image_tokens=...)
    assert load_family(str(tmp_path)).layout([(300, 500)]) == expected


@pytest.mark.parametrize("place", ["tokenizer_config.json", "processor_config.json", "named templates"])
def test_templates_are_found_wherever_they_stand(place: str, tmp_path: Path) -> None:
    _, config, processor = small.aya_vision()
    write_checkpoint(tmp_path, config, processor)
    template = (tmp_path / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.jinja").unlink()
    if place == "named templates":
        named = [{"name": "rag", "template": "rag"}, {"name": "default", "template": template}]
        edit(tmp_path / "tokenizer_config.json", chat_template=named)
    else:
        edit(tmp_path / place, chat_template=template)
    assert_equals_stock(load_family(str(tmp_path)), processor, [user_message("hi", images=1)], [noise(9, 9)])


def test_no_template_is_a_clear_error(tmp_path: Path) -> None:
    _, config, processor = small.aya_vision()
    write_checkpoint(tmp_path, config, processor)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="no chat template"):
        load_family(str(tmp_path)).prompt([user_message("hi")], ())


def test_end_of_sequence_ids(tmp_path: Path) -> None:
    _, config, processor = small.llava_onevision()
    write_checkpoint(tmp_path, config, processor)
    eos = processor.tokenizer.eos_token_id
    assert load_family(str(tmp_path)).eos_token_ids == {eos}
    edit(tmp_path / "generation_config.json", eos_token_id=[7, 9])
    assert load_family(str(tmp_path)).eos_token_ids == {7, 9}
    edit(tmp_path / "generation_config.json", eos_token_id=5)
    assert load_family(str(tmp_path)).eos_token_ids == {5}


def test_stop_strings(tmp_path: Path) -> None:
    _, config, processor = small.llava_onevision()
    write_checkpoint(tmp_path, config, processor)
    assert load_family(str(tmp_path)).stop_strings == ()
    edit(tmp_path / "generation_config.json", stop_strings="###")
    assert load_family(str(tmp_path)).stop_strings == ("###",)
    edit(tmp_path / "generation_config.json", stop_strings=["###", "User:"])
    assert load_family(str(tmp_path)).stop_strings == ("###", "User:")


def test_decode_skips_special_tokens(llava_onevision: Subject) -> None:
    family = llava_onevision.family
    ids = family.tokenizer("the 字 image<|im_end|>")["input_ids"]
    assert family.decode(ids) == "the 字 image"
    assert family.decode(torch.tensor(ids).numpy()) == "the 字 image"


def test_broken_checkpoints_say_why(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder, and not a hub id"):
        load_family(str(tmp_path / "missing"))
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_family(str(tmp_path))
    config = tmp_path / "config.json"
    config.write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_family(str(tmp_path))
    config.write_text("{}")
    with pytest.raises(CheckpointError, match="no model_type"):
        load_family(str(tmp_path))
    edit(config, model_type="gpt2")
    with pytest.raises(
        CheckpointError, match="'gpt2' is not served; Tessera serves aria, aya_vision, fuyu, "
    ):
        load_family(str(tmp_path))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n"


@pytest.mark.parametrize(
    "file, content, reason",
    [
        ("tokenizer.json", None, "no tokenizer there: none of tokenizer.json, tokenizer.model, vocab.json"),
        ("tokenizer.json", '{"version": "1.0", "added', "tokenizer.json is not valid JSON: "),
        ("tokenizer.json", "{}", "cannot use its tokenizer.json or tokenizer_config.json: KeyError: "),
        ("tokenizer.json", POINTER, "tokenizer.json is a Git LFS pointer, "),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not valid JSON: "),
        ("tokenizer_config.json", "[]", "tokenizer_config.json holds no JSON object"),
        (
            "config.json",
            '{"model_type": "llava_onevision", "text_config": 7}',
            "cannot use its config.json: ",
        ),
        ("config.json", "\0", "config.json is not valid JSON: "),
        ("processor_config.json", '{"image', "processor_config.json is not valid JSON: "),
        (
            "processor_config.json",
            '{"image_processor": 3}',
            "processor_config.json's image_processor is no object, ",
        ),
        (
            "processor_config.json",
            '{"image_processor": {"image_mean": "x"}}',
            "cannot use its processor_config.json or preprocessor_config.json: ",
        ),
        ("generation_config.json", "{", "generation_config.json is not valid JSON: "),
        ("chat_template.jinja", "{% if %}", "the chat template is not valid: "),
        ("chat_template.jinja", None, "the checkpoint has no chat template "),
    ],
)
def test_a_damaged_file_is_named_in_one_sentence(
    file: str, content: str | None, reason: str, tmp_path: Path
) -> None:
    path = shutil.copytree(untrained("llava_onevision"), tmp_path / "damaged")
    (path / file).unlink()
    if content is not None:
        (path / file).write_text(content)
    with pytest.raises(CheckpointError) as refused:
        load_family(str(path)).check_chat()
    assert str(refused.value).startswith(f"{path}: {reason}") and "\n" not in str(refused.value)


def test_a_template_that_wants_other_messages_is_no_fault(tmp_path: Path) -> None:
    path = shutil.copytree(untrained("llava_onevision"), tmp_path / "picky")
    (path / "chat_template.jinja").write_text("{{ raise_exception('an image first') }}")
    load_family(str(path)).check_chat()
    load_family(untrained("fuyu")).check_chat()  # which has none


def test_a_silent_hub_is_not_taken_for_a_missing_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        HubError, match=r"^org/nowhere: cannot use its config\.json: OSError: We couldn't connect"
    ):
        load_family("org/nowhere")


def test_inconsistent_checkpoints_are_refused(tmp_path: Path) -> None:
    _, config, processor = small.llava_onevision()
    write_checkpoint(tmp_path / "a", config, processor)
    edit(tmp_path / "a" / "config.json", image_token_index=3)
    with pytest.raises(CheckpointError, match=r"'<image>' is id \d+ .* config.json's image token is 3"):
        load_family(str(tmp_path / "a"))
    write_checkpoint(tmp_path / "b", config, processor, "4.x")
    edit(tmp_path / "b" / "preprocessor_config.json", image_grid_pinpoints=[[384, 500]])
    with pytest.raises(CheckpointError, match="multiples of the tile side 384"):
        load_family(str(tmp_path / "b"))
    edit(tmp_path / "b" / "preprocessor_config.json", size={"height": 384, "width": 300})
    with pytest.raises(CheckpointError, match="must be one square"):
        load_family(str(tmp_path / "b"))


def test_user_text_never_becomes_an_image(llava_onevision: Subject) -> None:
    """A placeholder that the template puts together out of two texts is caught after rendering."""
    family = llava_onevision.family
    family.chat_template, template = "{{ messages[0].content[0].text }}ge>", family.chat_template
    try:
        with pytest.raises(PromptError, match="1 times for 0 images"):
            family.prompt([user_message("<ima")], ())
    finally:
        family.chat_template = template


@pytest.mark.parametrize("build", TILED)
def test_load_model_round_trip(build: Callable[[], small.Parts], tmp_path: Path) -> None:
    model_class, config, processor = build()
    path = write_checkpoint(tmp_path, config, processor)
    torch.manual_seed(0)
    model_class(config).to(torch.bfloat16).save_pretrained(path)
    family = load_family(path)
    for dtype, expected in (
        ("auto", torch.bfloat16),
        ("float32", torch.float32),
        (torch.float16, torch.float32),  # on a CPU
    ):
        model = load_model(path, dtype=dtype)
        assert isinstance(model, model_class) and model.dtype == expected and not model.training
        layouts, pixels = lay_out(family, [noise(10, 10)])
        with torch.inference_mode():
            (features,) = family.embed_images(model, pixels, layouts)
        assert features.dtype == expected and len(features) == layouts[0].tokens


def test_loading_is_light() -> None:
    """A CPU actor pays for neither ray nor torchvision, nor for the models' code, which takes seconds to import."""
    script = f"""
import sys
import actors.generate, actors.preprocess
from actors.families import load_family, user_message
for path in {[untrained(name) for name in FAMILIES]!r}:
    family = load_family(path)
    family.prompt([user_message("describe", images=1)], family.layout([(30, 40)]))
heavy = ("ray", "torchvision", "transformers.modeling_utils")
loaded = [name for name in heavy if sys.modules.get(name)]
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
