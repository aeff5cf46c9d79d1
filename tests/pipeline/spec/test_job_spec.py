"""The job spec: defaults, overrides, fingerprints, and errors that name the field and the fix."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.spec.job_spec import JobSpec, SpecError, load_spec, parse_spec, template_fields

MINIMAL = {"input": {"path": "in"}, "model": {"path": "m"}, "output": {"path": "out"}}
FULL = """
name: nightly-captions
input: {path: s3://bucket/images/, image: image, video: null, max_frames: 32, prompt: null, keep: null}
prompt: {template: "Describe the image.", system: null}
model: {path: llava-hf/llava-onevision-qwen2-7b-ov-hf, revision: null, dtype: auto, engine: continuous}
generation:
  {max_new_tokens: 128, temperature: 0.0, top_p: 1.0, top_k: 0, repetition_penalty: 1.0, stop: [], seed: 0}
resources:
  preprocess: {replicas: [1, 16], cpus: 1}
  generate: {replicas: [1, 8], gpus: 1}
output: {path: s3://bucket/captions/}
limits:
  {max_failed_fraction: 0.05, max_failed_shards: 0, stop_after_failures: 200, max_pixels: 178956970,
   max_image_bytes: 67108864, formats: [jpeg, png, webp, gif, bmp, tiff, avif]}
"""


def with_field(name: str, value: object) -> JobSpec:
    data: dict = {key: dict(section) for key, section in MINIMAL.items()}
    *parents, leaf = name.split(".")
    section = data
    for key in parents:
        section = section.setdefault(key, {})
    section[leaf] = value
    return parse_spec(data)


def test_the_documented_spec_is_the_default(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(FULL)
    spec = load_spec(tmp_path / "job.yaml")
    assert spec.input.path == ("s3://bucket/images/",)
    for name in ("generation", "resources", "limits", "prompt"):
        assert getattr(spec, name) == getattr(parse_spec(MINIMAL), name)
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert parse_spec(spec.model_dump(mode="json")) == spec


def test_overrides(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(FULL)
    spec = load_spec(
        tmp_path / "job.yaml",
        [
            "generation.max_new_tokens=64",
            "generation.stop=[a, 'b']",
            "input.keep=[id, truth]",
            "resources.generate.replicas=2",
            "prompt.template={title}: what is it?",
            "prompt.system=Be brief: one line.",
            "model.revision=1234567",
            "model.dtype=float32",
            "input.prompt=null",
            "input.image=null",
            "input.video=clip",
            "output.path=out/x",
        ],
    )
    assert spec.generation.max_new_tokens == 64
    assert spec.generation.stop == ("a", "b")
    assert spec.input.keep == ("id", "truth")
    assert spec.input.prompt is None
    assert (spec.input.image, spec.input.video) == (None, "clip")
    assert spec.resources.generate.replicas == (2, 2)
    assert spec.prompt.template == "{title}: what is it?"
    assert spec.prompt.system == "Be brief: one line."
    assert spec.model.revision == "1234567"
    assert spec.model.dtype == "float32"
    assert spec.output.path == "out/x"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (
            "generation.max_new_token",
            5,
            ["generation.max_new_token", "did you mean generation.max_new_tokens?"],
        ),
        ("max_new_tokens", 5, ["unknown field max_new_tokens", "did you mean generation.max_new_tokens?"]),
        ("resources.generate.gpu", 1, ["did you mean resources.generate.gpus?"]),
        ("zzz", 1, ["unknown field zzz", "the spec has name, input, prompt"]),
        ("generation.top_p", 1.5, ["generation.top_p", "less than or equal to 1", "found 1.5"]),
        (
            "generation.max_new_tokens",
            "many",
            ["generation.max_new_tokens: must be a valid integer; found 'many'"],
        ),
        ("generation.max_new_tokens", True, ["generation.max_new_tokens", "must be a number", "True"]),
        ("generation.temperature", float("nan"), ["generation.temperature", "found nan"]),
        ("model.revision", 1234567, ["model.revision", "put it in quotes", "1234567"]),
        ("model.dtype", "fp8", ["model.dtype", "'float32'", "found 'fp8'"]),
        ("resources.generate.replicas", [4, 1], ["resources.generate.replicas", "minimum (4)"]),
        ("resources.generate.replicas", "two", ["resources.generate.replicas", "[min, max]"]),
        ("resources.generate.replicas", 0, ["resources.generate.replicas", "at least 1"]),
        ("resources.generate.gpus", 1.5, ["resources.generate.gpus", "whole number"]),
        ("generation", None, ["generation", "found nothing"]),
        ("model", "a/b", ["model: must be a section, with its fields indented below it; found 'a/b'"]),
        ("generation.stop", None, ["generation.stop: must be a list; found nothing"]),
        ("output.path", None, ["output.path: must be text; found nothing"]),
        ("input.max_frames", 0, ["input.max_frames", "greater than or equal to 1", "found 0"]),
        ("input.path", [], ["input.path: must have at least 1; found []"]),
        ("input.path", ["a", 3], ["input.path[1]", "found 3"]),
        ("limits.formats", ["png", "jpg"], ["limits.formats", "'jpg' is none of", "jpeg, png, webp"]),
        ("limits.formats", "eps", ["limits.formats", "'eps' is none of"]),
        ("limits.formats", [], ["limits.formats", "at least 1"]),
        ("limits.max_image_bytes", 0, ["limits.max_image_bytes", "greater than or equal to 1"]),
        ("prompt.template", "{a.b}", ["prompt.template", "{a.b}", "plain column names"]),
        ("prompt.template", "{a[0]}", ["prompt.template", "plain column names"]),
        ("prompt.template", "{a!r}", ["prompt.template", "{a!r}"]),
        ("prompt.template", "{0}", ["prompt.template", "plain column names"]),
        ("prompt.template", "{", ["prompt.template", "{{ and }}"]),
    ],
)
def test_errors_name_the_field_what_was_found_and_the_fix(name: str, value: object, words: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        with_field(name, value)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_sections_are_all_named() -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec({"input": {"path": "x"}})
    assert "model is missing" in str(caught.value)
    assert "output is missing" in str(caught.value)


CREDENTIALS = [
    "s3://AKIA:hush@bucket/x",
    "s3://AKIA:hu/sh@bucket/x",
    "s3://AKIA:hush hush@bucket/x",
    "https://u:hush@host:80/x",
    "https://AKIAhush@host/x",
    "https://host/x.parquet?X-Amz-Credential=AKIA&X-Amz-Signature=hush",
    "https://account.blob.core.windows.net/c/x?sv=2024&se=AKIA&sig=hush%3D",
    "https://host/x.parquet?hush",
    "https://host/x?&sig=hush",
    "https://host/x?_t=hush",
    "simplecache::https://host/x?sig=hush",
    "zip://a.parquet::https://u:hush@host/x.zip",
]


@pytest.mark.parametrize("url", CREDENTIALS)
@pytest.mark.parametrize("name", ["input.path", "model.path", "output.path"])
def test_credentials_are_refused_and_never_repeated(url: str, name: str) -> None:
    with pytest.raises(SpecError) as caught:
        with_field(name, url)
    assert "credentials" in str(caught.value)
    assert "environment" in str(caught.value)
    assert name in str(caught.value)
    assert "AKIA" not in str(caught.value)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize("url", ["s3://AKIA:hush@bucket/x", "https://host/x?sig=hush"])
def test_no_other_refusal_repeats_credentials_either(tmp_path: Path, url: str) -> None:
    (tmp_path / "job.yaml").write_text(f"input: {url}\nmodel: {{path: m}}\noutput: {{path: [{url}]}}\n")
    (tmp_path / "broken.yaml").write_text(f"output: {{path: {url}\n")
    for name, overrides in [
        ("job.yaml", []),
        ("broken.yaml", []),
        (f"{url}.yaml", []),
        ("job.yaml", [f"output.path.x={url}", f"input={url}"]),
        ("job.yaml", [url]),
    ]:
        with pytest.raises(SpecError) as caught:
            load_spec(name if "://" in name else tmp_path / name, overrides)
        assert "hush" not in str(caught.value), str(caught.value)


def test_a_checkpoint_may_be_in_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert with_field("model.path", "~/llava").model.path == "/home/somebody/llava"
    assert with_field("model.path", "org/~llava").model.path == "org/~llava"


@pytest.mark.parametrize(
    "url",
    [
        "http://host:9000/a@b", "s3://bucket/a@b:c", "sftp://user@host/x", "C:/x@y", "/a/b", "a?b=c/d",
        "github://org:repo@ref/in", "s3://bucket/day=202?/part-?.parquet", "hf://datasets/a/b@main/x",
        "abfs://container@account.dfs.core.windows.net/x", "zip://a.parquet::hf://datasets/a/b@main/x.zip",
    ],
)  # fmt: skip
def test_urls_without_credentials_are_not_refused(url: str) -> None:
    assert with_field("output.path", url).output.path == url


@pytest.mark.parametrize(
    "override", ["generation.max_new_tokens", "=3", "a..b=3", "input.path.x=3", "generation=[: x"]
)
def test_bad_overrides(tmp_path: Path, override: str) -> None:
    (tmp_path / "job.yaml").write_text("input: {path: in}\nmodel: {path: m}\noutput: {path: o}\n")
    with pytest.raises(SpecError):
        load_spec(tmp_path / "job.yaml", [override])


@pytest.mark.parametrize("text", ["a: [", "- 1", "", "\x00"])
def test_files_that_are_no_spec(tmp_path: Path, text: str) -> None:
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(SpecError, match=r"job\.yaml"):
        load_spec(tmp_path / "job.yaml")
    with pytest.raises(SpecError, match=r"nowhere\.yaml"):
        load_spec(tmp_path / "nowhere.yaml")


def test_a_spec_is_read_from_a_url(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(FULL)
    assert load_spec(f"file://{tmp_path}/job.yaml").name == "nightly-captions"


def test_template_fields() -> None:
    assert template_fields("{b} and {a}, {{not}} {b} {my col}") == ("b", "a", "my col")
    assert "{b} {{x}} {my col}".format_map({"b": 1, "my col": 2}) == "1 {x} 2"
    assert with_field("prompt.template", "Look at {id}").prompt.fields == ("id",)


@given(st.text())
def test_a_template_is_refused_or_renders(template: str) -> None:
    try:
        fields = template_fields(template)
    except ValueError:
        return
    template.format_map(dict.fromkeys(fields, "x"))


def test_the_fingerprint_fields_are_those_captions_depend_on() -> None:
    base = with_field("name", "a")
    different = {
        "input.image": "jpg", "input.video": "clip", "input.max_frames": 8,
        "input.prompt": "q", "input.keep": ["id"], "prompt.template": "x",
        "prompt.system": "x",
        "model.path": "x", "model.revision": "x", "model.dtype": "float32", "generation.seed": 1,
        "generation.stop": ["x"], "generation.max_new_tokens": 1,
    }  # fmt: skip
    for name, value in different.items():
        changed = with_field(name, value)
        differing = {k for k, v in changed.fingerprint_fields().items() if v != base.fingerprint_fields()[k]}
        assert differing == {name}
    same = {
        "name": "b", "input.path": "x", "model.engine": "reference", "output.path": "x",
        "resources.generate.gpus": 0, "limits.max_failed_fraction": 1,
        "limits.max_pixels": 1, "limits.max_image_bytes": 1, "limits.formats": "png",
    }  # fmt: skip
    for name, value in same.items():
        assert with_field(name, value).fingerprint_fields() == base.fingerprint_fields(), name


def test_import_is_light() -> None:
    heavy = "{'torch', 'ray', 'transformers', 'pyarrow', 'fsspec', 'numpy'}"
    code = f"import sys, pipeline.spec.job_spec, pipeline.storage.storage; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_folder_in_place_of_the_spec_is_told(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="is a folder; name the job spec, a .yaml file"):
        load_spec(tmp_path)
