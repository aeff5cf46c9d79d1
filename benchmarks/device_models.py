"""One model on the device: static generate on the stock model, then the engine, which takes that same model.

So a model of 25B parameters needs to fit once. vLLM comes last, in a process of its own, when the engine is gone.
"""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from actors.engine.engine import ContinuousEngine
from actors.engine.types import EngineRecord, Request
from benchmarks.device_meter import DECODE, Demand, Meter, Rates
from benchmarks.device_profile import StepProfiler
from benchmarks.device_report import Report, Result
from benchmarks.engine_models import build
from benchmarks.engine_systems import Measured, run_engine, run_generate, timed
from benchmarks.engine_vllm import VLLM_FAMILIES, run_vllm
from benchmarks.engine_workloads import rows

FULL_ROWS = {"decode-heavy": 384, "prefill-heavy": 32}
"""More than the engine's slots on CUDA; prompts of thousands of tokens for some seconds."""
QUICK_ROWS = {"decode-heavy": 320, "prefill-heavy": 16}
CPU_ROWS = {"decode-heavy": 32, "prefill-heavy": 8}
CUDA_BATCHES = {"decode-heavy": 64, "prefill-heavy": 8}
"""Of static generate: one size, near its best, so that its time stays short."""
CPU_BATCHES = {"decode-heavy": 8, "prefill-heavy": 4}
PROFILED_ROWS = {"decode-heavy": 256, "prefill-heavy": 12}
STATIC_BATCHES_OF_ROWS = 2
"""Static generate gets the first rows, for that many of its batches; rates compare."""


@dataclass(frozen=True)
class Plan:
    """What to measure, and how much of it."""

    workloads: Sequence[str]
    row_counts: dict[str, int]
    batches: dict[str, int]
    generate: bool
    vllm_python: str | None
    rounds: int
    profile: bool


class ModelBench:
    """Builds one model of random weights and measures it; `results` and `record` grow as it goes."""

    def __init__(
        self, family: str, size: str, folder: Path, device: torch.device, dtype: torch.dtype, report: Report
    ) -> None:
        self.size, self.folder, self.report = size, folder, report
        self.device, self.dtype = device, dtype
        self.name = f"{family} {size}"
        begin = time.perf_counter()
        self.family, self._stock = build(family, size, folder, dtype, device)
        self._synchronize()
        billions = self._stock.num_parameters() / 1e9
        report.say(f"{self.name}: {billions:.3g} B parameters in {time.perf_counter() - begin:.1f} s")
        self.results: list[Result] = []
        self.engine: weakref.ref | None = None

    def prove(self) -> tuple[ContinuousEngine, EngineRecord]:
        """The engine, which owns the model from here on."""
        begin = time.perf_counter()
        engine = ContinuousEngine(self.family, self._stock)
        self._synchronize()
        self.engine, record = weakref.ref(engine), engine.record
        paths = f"attention {record.attention}, layers {record.layers}, experts {record.experts}"
        self.report.say(
            f"{self.name}: engine made in {time.perf_counter() - begin:.1f} s; {record.dtype}, {paths}, "
            f"graphs {record.graphs}; {'; '.join(record.why) or 'nothing stood against the fastest paths'}"
        )
        return engine, record

    def measure(self, plan: Plan, peak: Rates) -> EngineRecord:
        """All systems over all workloads."""
        cases = {name: rows(self.family, self.size, name, plan.row_counts[name]) for name in plan.workloads}
        demands = {name: Demand.of(self._stock, self.family, case[0]) for name, case in cases.items()}
        static: dict[str, Result] = {}
        if plan.generate:
            for name, case in cases.items():
                found = self._generate(name, case, plan.batches[name])
                if found is not None:
                    static[name] = found
        free_memory(self.device)  # the engine's cache takes what is free now
        engine, record = self.prove()
        for name, case in cases.items():
            self._tessera(name, case, engine, demands[name], peak, plan, static.get(name))
        if plan.vllm_python and self.family.name in VLLM_FAMILIES:
            del engine, self._stock
            free_memory(self.device, self.engine)
            for name, case in cases.items():
                self._vllm(plan.vllm_python, name, case, plan.rounds, static.get(name))
        return record

    def _generate(self, workload: str, case: Sequence[Request], batch: int) -> Result | None:
        if self.report.left < 30:
            self.report.say(f"{self.name} {workload}: no time for generate")
            return None
        some = case[: STATIC_BATCHES_OF_ROWS * batch]
        run = run_generate(self.family, self._stock, batch)
        try:
            run(_shortened(some[:batch]))
            measured = timed(f"generate {batch}", some, run, time.perf_counter)
        except torch.OutOfMemoryError:
            self.report.say(f"{self.name} {workload}: generate in batches of {batch} is out of memory")
            return None
        result = self._result(workload, some, measured)
        self.report.say(result.line())
        self.results.append(result)
        return result

    def _tessera(
        self,
        workload: str,
        case: Sequence[Request],
        engine: ContinuousEngine,
        demand: Demand,
        peak: Rates,
        plan: Plan,
        static: Result | None,
    ) -> None:
        run = run_engine(engine)
        run(
            [replace(row, sampling=replace(row.sampling, max_new_tokens=4)) for row in case[: len(case) // 4]]
        )
        best, meter = None, None
        for _ in range(plan.rounds):
            with Meter(engine, demand) as watched:
                measured = timed("tessera", case, run, time.perf_counter)
            if best is None or measured.seconds < best.seconds:
                best, meter = measured, watched
        assert best is not None and meter is not None
        result = replace(
            self._result(workload, case, best, static),
            prefill_mfu=meter.prefill_mfu(peak),
            # Which experts a step meets is the router's affair, and so what it reads.
            decode_bandwidth=None if demand.experts else meter.decode_bandwidth(peak),
            encoding=meter.encoding_share(),
        )
        self.report.say(result.line())
        self.results.append(result)
        if self.device.type == "cuda" or plan.profile:
            self.results[-1] = self._profiled(result, case, engine, demand, meter, plan.profile)

    def _profiled(
        self,
        result: Result,
        case: Sequence[Request],
        engine: ContinuousEngine,
        demand: Demand,
        meter: Meter,
        show: bool,
    ) -> Result:
        """Another pass, with some steps under the profiler: what a full decode step takes beside the time in which the
        device is busy is what it waits for the host."""
        if self.report.left < 2 * meter.seconds:
            self.report.say(f"{self.name} {result.workload}: no time for the profiled pass")
            return result
        profiler = StepProfiler(self.device)
        with Meter(engine, demand, profiler):
            run_engine(engine)(case[: PROFILED_ROWS[result.workload]])
        profiler.close()
        for kind, profiled in profiler.profiled.items():
            if show:
                self.report.say(f"{self.name} {result.workload}: {profiled.steps} {kind} steps, profiled")
                self.report.block(profiled.table)
        decode = profiler.profiled.get(DECODE)
        if decode is None or self.device.type != "cuda":
            return result
        step = meter.step_seconds(DECODE, decode.fewest, decode.most)
        if step is None:
            return result
        step_ms, host_ms = 1e3 * step, 1e3 * max(0.0, step - decode.busy)
        self.report.say(
            f"{self.name} {result.workload}: a decode step of {decode.fewest} - {decode.most} sequences takes "
            f"{step_ms:.2f} ms, of which the device waits for {host_ms:.2f} ms"
        )
        return replace(result, step_ms=step_ms, host_ms=host_ms)

    def _vllm(
        self, python: str, workload: str, case: Sequence[Request], rounds: int, static: Result | None
    ) -> None:
        if self.report.left < 90:
            self.report.say(f"{self.name} {workload}: no time for vllm")
            return
        dtype = str(self.dtype).removeprefix("torch.")
        try:
            measured = run_vllm(python, self.folder, case, rounds, torch.get_num_threads(), "wall", dtype)
        except RuntimeError as error:
            self.report.say(f"{self.name} {workload}: no figure for vllm")
            self.report.block(str(error))
            return
        result = self._result(workload, case, measured, static)
        self.report.say(result.line())
        self.results.append(result)

    def _result(
        self, workload: str, case: Sequence[Request], measured: Measured, static: Result | None = None
    ) -> Result:
        images = sum(len(row.layouts) for row in case)
        return Result(
            family=self.family.name,
            size=self.size,
            workload=workload,
            system=measured.system,
            rows=measured.rows,
            images_per_s=images / measured.seconds,
            rows_per_s=measured.rows / measured.seconds,
            tokens_per_s=measured.tokens_per_s,
            prompt_tokens=round(sum(len(row.token_ids) for row in case) / len(case)),
            times_generate=measured.tokens_per_s / static.tokens_per_s if static else None,
        )

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _shortened(rows: Sequence[Request]) -> list[Request]:
    """Rows to warm up with: four tokens each."""
    return [replace(row, sampling=replace(row.sampling, max_new_tokens=4)) for row in rows]


def free_memory(device: torch.device, engine: weakref.ref | None = None) -> None:
    """Gives the device back what nothing refers to any more; an idle `engine` is held by its thread for seconds."""
    gc.collect()
    if device.type != "cuda":
        return
    deadline = time.perf_counter() + 10
    while engine is not None and engine() is not None and time.perf_counter() < deadline:
        time.sleep(0.1)
        gc.collect()
    torch.cuda.empty_cache()
