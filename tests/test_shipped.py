"""Tables that come with the package: what is shipped holds, and what is measured here wins over it."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import pytest
import recorded
import torch

from workbench import MoELayer, registry, select, shipped
from workbench import table as tables
from workbench.environment import sources_digest
from workbench.errors import InputError, RecordError
from workbench.generate import make_weights
from workbench.problem import MoEShape
from workbench.table import Cell, Table
from workbench.trace import Environment, Status, Trace
from workbench.variant import Config, Variant

FUSED, OTHER = recorded.variant("cuda.sm90_fused"), recorded.variant("cuda.other")
VARIANTS = recorded.named(FUSED, OTHER)
LAYER = Cell(recorded.SHAPE, "uniform", "bf16", "layer")
OLDER = dataclasses.replace(recorded.HERE, driver="1.2.3", torch="2.0")
ELSEWHERE = dataclasses.replace(recorded.HERE, device="Another GPU")
PACKAGED = shipped.FOLDER
FILES = sorted(PACKAGED.glob("*/*"))


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder in place of the package's, and nothing remembered of any."""
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    monkeypatch.delenv("MOE_WORKBENCH_SHIPPED", raising=False)
    shipped._cells.cache_clear()
    shipped._say.cache_clear()
    return tmp_path


def traces(
    figures: dict[int, dict[Variant, float]], environment: Environment = recorded.HERE, created: str = "2026-01-01"
) -> list[Trace]:
    """M -> variant -> microseconds of the layer."""
    made = []
    for num_tokens, by_variant in figures.items():
        for variant, median_us in by_variant.items():
            key = recorded.key(variant, 0, num_tokens, environment=environment)
            made += [recorded.verified(key, created=created), recorded.timed(key, median_us, scope="layer")]
    return made


def table(figures: dict[int, dict[Variant, float]] | None = None) -> Table:
    return tables.build(traces(figures or {}), recorded.HERE, VARIANTS)


def choice(own: Table, num_tokens: int) -> select.Choice:
    merged = shipped.with_shipped(own, recorded.SHAPE, VARIANTS)
    return select.choose(merged, LAYER, num_tokens, VARIANTS, recorded.CPU)


def test_a_shipped_table_decides_where_nothing_was_measured_here(folder: Path) -> None:
    shipped.write(
        traces({8: {FUSED: 20.0, OTHER: 10.0}, 32: {FUSED: 30.0, OTHER: 40.0}}), recorded.HERE, VARIANTS, folder
    )
    assert choice(table(), 8).variant == "cuda.other"
    assert choice(table(), 32).variant == "cuda.sm90_fused"
    assert choice(table(), 8).reason.startswith("M=8, shipped: 10.0 us [9.9, 10.1], 2.00x the speed of the default")
    assert choice(table(), 16).reason.startswith("between M=8, shipped and M=32, shipped, interpolated: ")
    assert all(one.shipped for num_tokens in (8, 16) for one, _ in choice(table(), num_tokens).candidates)


def test_what_is_measured_here_wins_m_by_m(folder: Path) -> None:
    shipped.write(
        traces({8: {FUSED: 20.0, OTHER: 10.0}, 32: {FUSED: 20.0, OTHER: 10.0}}), recorded.HERE, VARIANTS, folder
    )
    own = table({8: {FUSED: 5.0}})
    assert choice(own, 8).variant == "cuda.sm90_fused"
    assert [one.shipped for one, _ in choice(own, 8).candidates] == [False]
    assert choice(own, 32).variant == "cuda.other"
    assert own.traces == shipped.with_shipped(own, recorded.SHAPE, VARIANTS).traces  # and is all that is ever saved


def test_what_is_wrong_here_is_not_chosen_whatever_is_shipped(folder: Path) -> None:
    shipped.write(traces({8: {FUSED: 20.0, OTHER: 10.0}}), recorded.HERE, VARIANTS, folder)
    wrong = recorded.verified(recorded.key(OTHER, 0, 8), Status.WRONG)
    own = tables.build([wrong], recorded.HERE, VARIANTS)
    assert choice(own, 8).variant == "cuda.sm90_fused"
    assert {one.variant: one.status for one, _ in choice(own, 8).candidates}["cuda.other"] == "wrong"


def test_a_table_of_another_driver_is_taken_only_when_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shipped.write(traces({8: {FUSED: 20.0, OTHER: 10.0}}, OLDER), OLDER, VARIANTS, folder)
    differing = f"driver '1.2.3', here '{recorded.HERE.driver}'; torch '2.0', here '{recorded.HERE.torch}'"
    for _ in range(2):
        assert not choice(table(), 8).measured
    monkeypatch.setenv("MOE_WORKBENCH_SHIPPED", "device")
    for _ in range(2):
        assert choice(table(), 8).variant == "cuda.other"
    said = [record.getMessage() for record in caplog.records if record.name == "workbench.shipped"]
    assert said == [
        f"shipped selection tables not used: made with {differing}; "
        "MOE_WORKBENCH_SHIPPED=device takes them all the same",
        f"shipped selection tables used, though made with {differing}",
    ]
    monkeypatch.setenv("MOE_WORKBENCH_SHIPPED", "off")
    assert not choice(table(), 8).measured
    monkeypatch.setenv("MOE_WORKBENCH_SHIPPED", "yes")
    with pytest.raises(InputError, match=r"^MOE_WORKBENCH_SHIPPED: expected exact, device or off, got 'yes'$"):
        choice(table(), 8)


def test_a_table_of_another_device_or_of_other_sources_is_a_miss(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_WORKBENCH_SHIPPED", "device")
    shipped.write(traces({8: {FUSED: 20.0, OTHER: 10.0}}, ELSEWHERE), ELSEWHERE, VARIANTS, folder)
    assert not choice(table(), 8).measured
    changed = [
        dataclasses.replace(one, key=dataclasses.replace(one.key, sources="0" * 16))
        for one in traces({8: {FUSED: 1.0}})
    ]
    assert shipped.write(changed, recorded.HERE, VARIANTS, folder) == []
    stale = Table(recorded.HERE, tuple(changed), {})
    tables.save(stale, shipped.file_of(recorded.HERE.device, recorded.SHAPE, folder))
    assert not choice(table(), 8).measured


def test_a_torn_table_is_refused_by_name(folder: Path) -> None:
    (path,) = shipped.write(traces({8: {FUSED: 20.0}}), recorded.HERE, VARIANTS, folder)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(RecordError, match=r"E8_N256_K256_top2_shared0\.json\.gz: not a selection table, or truncated"):
        choice(table(), 8)


def test_equal_tables_are_equal_files(folder: Path) -> None:
    made = traces({8: {FUSED: 20.0, OTHER: 10.0}})
    (path,) = shipped.write(made, recorded.HERE, VARIANTS, folder)
    first = path.read_bytes()
    shipped.write(reversed(made), recorded.HERE, VARIANTS, folder)
    assert path.read_bytes() == first


def test_forms_of_a_layer_and_devices_have_files_of_their_own() -> None:
    plain = MoEShape(257, 7168, 128, 9, 1, name="dsv3_tp16")
    form = dataclasses.replace(plain, swiglu_limit=10.0, activation_scales="group_ue8m0")
    names = [
        shipped.file_of("NVIDIA H200", shape, PACKAGED).relative_to(PACKAGED).as_posix() for shape in (plain, form)
    ]
    assert names == [
        "NVIDIA_H200/E257_N256_K7168_top9_shared1.json.gz",
        "NVIDIA_H200/E257_N256_K7168_top9_shared1_limit10_group_ue8m0.json.gz",
    ]


def test_a_layer_runs_by_a_shipped_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_WORKBENCH_RESULTS", str(folder / "none"))
    select._log_miss.cache_clear()
    variants = registry.variants()
    made = [
        one
        for name, median_us in (("torch.loop", 10.0), ("torch.grouped", 20.0))
        for one in recorded.both(
            recorded.key(variants[name], Config(), 5, sources=sources_digest(variants[name])), median_us
        )
    ]
    weights = make_weights(recorded.SHAPE, seed=0, device=torch.device("cpu"))

    def layer() -> MoELayer:
        return MoELayer(weights.w13, weights.w13_scale, weights.w2, weights.w2_scale, top_k=2)

    assert layer().choice(5)[0] == "torch.grouped"
    shipped._cells.cache_clear()
    shipped.write(made, recorded.HERE, variants, folder)
    assert layer().choice(5)[0] == "torch.loop"
    assert layer().measured_tokens() == (5,)


@pytest.mark.skipif(not FILES, reason="no table is shipped yet: the loader treats what is not there as empty")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_is_shipped_was_measured_on_these_sources(path: Path) -> None:
    environment, found = tables.read(path)
    assert shipped.file_of(environment.device, found[0].key.shape, PACKAGED) == path
    digests = {name: sources_digest(variant) for name, variant in registry.variants().items()}
    stale = {one.key.variant for one in found if one.key.sources != digests[one.key.variant]}
    assert not stale, f"the sources of {stale} changed: measure again with `workbench ship`"
    assert {one.key.environment for one in found} == {environment}
    built = tables.build(found, environment, registry.variants())
    assert set(built.traces) == set(found)
    chosen = [one for by_tokens in built.cells.values() for some in by_tokens.values() for one in some if one.timing]
    assert chosen, "nothing in it may be chosen"


def test_what_is_shipped_is_package_data() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    packaged = {
        path
        for pattern in project["tool"]["setuptools"]["package-data"]["workbench"]
        for path in PACKAGED.parent.glob(pattern)
    }
    assert set(FILES) <= packaged
    example = shipped.file_of("NVIDIA H200", recorded.SHAPE, Path("measured"))
    assert any(example.match(pattern) for pattern in project["tool"]["setuptools"]["package-data"]["workbench"])


def test_what_is_shipped_is_small() -> None:
    assert sum(path.stat().st_size for path in FILES) < 1_500_000
