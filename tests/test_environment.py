"""The environment of a measurement, and the settings."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from workbench import environment
from workbench.environment import Clocks, current, settings, sources_digest, throttle_names
from workbench.errors import InputError


class WithSources:
    """As much of a variant as has a digest."""

    def __init__(self, *paths: Path) -> None:
        self.paths = paths

    def sources(self) -> tuple[Path, ...]:
        return self.paths


def test_the_environment_of_a_cpu_names_its_processor_and_the_versions() -> None:
    here = current("cpu")
    assert here.device
    assert here.driver == "none"
    assert here.torch == torch.__version__
    assert here == current(torch.device("cpu"))


def test_a_package_that_is_not_installed_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise environment.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(environment.metadata, "version", absent)
    assert (current("cpu").triton, current("cpu").cupy) == ("none", "none")


@pytest.mark.gpu
def test_the_environment_and_the_clocks_of_a_gpu(device: torch.device) -> None:
    here = current(device)
    assert here.device == torch.cuda.get_device_name(device)
    assert here.driver.split(".")[0].isdecimal()
    assert here.cuda == torch.version.cuda
    clocks = environment.clocks(device)
    assert clocks.sm_mhz > 0
    assert not any(reason.startswith("unknown") for reason in clocks.throttle_reasons)


def test_a_cpu_has_no_clock_to_record() -> None:
    assert environment.clocks("cpu") == Clocks(0, ())


def test_throttle_reasons_are_named_and_harmless_ones_left_out() -> None:
    nvml = SimpleNamespace(
        nvmlClocksThrottleReasonNone=0,
        nvmlClocksThrottleReasonGpuIdle=1,
        nvmlClocksThrottleReasonSwPowerCap=4,
        nvmlClocksThrottleReasonHwSlowdown=8,
        nvmlClocksThrottleReasonAll=0x1FF,
    )
    assert throttle_names(nvml, 0) == ()
    assert throttle_names(nvml, 1 | 4 | 8) == ("HwSlowdown", "SwPowerCap")


def test_the_digest_changes_with_the_content_and_not_with_the_place(tmp_path: Path) -> None:
    for folder, content in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "kernel.cu").write_text(content)
    first, moved, changed = (WithSources(tmp_path / folder / "kernel.cu") for folder in "abc")
    assert sources_digest(first) == sources_digest(moved)
    assert sources_digest(first) != sources_digest(changed)
    assert len(sources_digest(first)) == 16


def test_the_digest_tells_where_one_file_ends_and_the_next_begins(tmp_path: Path) -> None:
    def written(*contents: str) -> WithSources:
        folder = tmp_path / "-".join(contents)
        folder.mkdir()
        paths = [folder / f"{i}.py" for i in range(len(contents))]
        for path, content in zip(paths, contents, strict=True):
            path.write_text(content)
        return WithSources(*paths)

    assert sources_digest(written("ab", "c")) != sources_digest(written("a", "bc"))


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOE_WORKBENCH_RESULTS", raising=False)
    monkeypatch.delenv("MOE_WORKBENCH_VARIANTS", raising=False)
    monkeypatch.delenv("MOE_WORKBENCH_EXCLUDE", raising=False)
    assert settings() == environment.Settings(Path("results"), ())
    monkeypatch.setenv("MOE_WORKBENCH_RESULTS", "/some/where")
    monkeypatch.setenv("MOE_WORKBENCH_VARIANTS", "mine, other.kernels,")
    monkeypatch.setenv("MOE_WORKBENCH_EXCLUDE", "torch.loop ,triton.grouped")
    assert settings() == environment.Settings(
        Path("/some/where"), ("mine", "other.kernels"), exclude=("torch.loop", "triton.grouped")
    )


def test_the_mode_of_the_plugins_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, mode in (("", "on"), ("on", "on"), ("off", "off"), ("copies", "copies")):
        monkeypatch.setenv("MOE_WORKBENCH_PLUGIN", given)
        assert environment.plugin_mode() == mode
    monkeypatch.setenv("MOE_WORKBENCH_PLUGIN", "0")
    with pytest.raises(InputError, match=r"^MOE_WORKBENCH_PLUGIN: expected off, on or copies, got '0'$"):
        environment.plugin_mode()
