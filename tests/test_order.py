"""Who computes a call, as measured: the tables, what reads them, and the command that makes them."""

import json
import os
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402

import flagops  # noqa: E402
from flagops import machine, order, registry  # noqa: E402
from flagops.tools import measure, tune, tune_cases  # noqa: E402

KIND = machine.cpu_kind()


def table(**rows):
    return order.Table(KIND, rows.get("run", {"*": ("numba", "torch")}), rows.get("replace", {"*": ()}), {}, "a test")


def rows_of(handle):
    return {row.op: (row.replaced, row.passed) for row in handle.report().rows}


def test_shipped_tables_name_what_exists():
    for path in order.SHIPPED.glob("*.json"):
        found = order.read(path, path.name)
        assert found.run["*"]
        assert set(json.loads(path.read_text())["run"]["*"]) <= set(registry.BUILT_IN)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("cpu-unheard-of", "cpu"),
        ("cuda", "cuda"),
        ("npu", "other"),
        ("cpu-amd-avx512-bf16", "cpu-amd-avx512-bf16"),
        ("cpu-amd-avx512-bf16-more", "cpu-amd-avx512-bf16"),
        ("cpu-avx512-bf16", "cpu"),
        ("cpu-intel-avx512-bf16-amx", "cpu-intel-avx512-bf16-amx"),
        ("cpu-intel-avx512-bf16", "cpu-intel-avx512-bf16"),
        ("cpu-intel-avx2", "cpu"),
    ],
)
def test_the_nearest_class_serves_a_machine_without_a_table(kind, name):
    assert order.shipped(kind).source == f"flagops/orders/{name}.json"


@pytest.mark.parametrize(
    ("operator", "shape", "rows"),
    [
        ("matmul", (1, 64), "one"),
        ("matmul", (32, 1, 64), "one"),
        ("matmul", (16, 64), "few"),
        ("linear", (2, 9, 64), "many"),
        ("linear", (64,), "one"),
        ("scaled_dot_product_attention", (2, 8, 1, 64), "one"),
        ("sparse_attention", (1, 17, 64, 512), "many"),
        ("moe_experts", (3, 64), "few"),
        ("rms_norm", (4, 64), "few"),
        ("fp8_dequantize", (128, 64), "many"),
    ],
)
def test_rows_are_what_shares_a_matrix(operator, shape, rows):
    assert order.rows_of(registry.operator(operator), shape) == rows


def test_the_longest_key_decides():
    found = table(
        run={"*": ("a",), "matmul": ("b",), "matmul.float32": ("c",), "matmul.float32.one": ("d",)},
        replace={"*": (), "linear": ("b",), "linear.training": ()},
    )
    asked = [
        ("matmul", "float32", "one"),
        ("matmul", "float32", "few"),
        ("matmul", "float64", "one"),
        ("linear", "float32", "one"),
    ]
    assert [found.runs(*key) for key in asked] == [("d",), ("c",), ("b",), ("a",)]
    assert found.replaces("linear", "float32", "one") == ("b",)
    assert found.replaces("linear", "float32", "one", training=True) == ()
    assert [found.replaces_any(name) for name in ("linear", "matmul")] == [True, False]
    assert table(replace={"*": ("b",), "matmul": ()}).replaces_any("matmul") is False


def test_calls_are_left_to_torch_or_taken_by_their_rows():
    x, w = torch.randn(20, 8), torch.randn(8, 8)
    with order.forced(table(replace={"*": (), "linear.float32.one": ("numba",)})), flagops.enable() as handle:
        F.linear(x[:1], w, w[0])
        F.linear(x[:5], w, w[0])
        F.linear(x[:5].double(), w.double(), w[0].double())
        found = rows_of(handle)["aten::addmm"]
    few = "torch's own kernel is faster for few rows, says a test"
    assert found == ({"linear/numba": 1}, {few: 2})


def test_what_torch_always_computes_faster_is_not_registered_and_costs_nothing():
    x = torch.randn(4, 4)
    with order.forced(table(replace={"*": (), "rms_norm": ("numba",)})):
        with flagops.enable() as handle:
            x @ x
            F.rms_norm(x, (4,))
            assert rows_of(handle) == {"aten::rms_norm": ({"rms_norm/numba": 1}, {})}
            assert handle.ops == ("rms_norm",)
        for named in ({"backend": "numba"}, {"strict": True}):
            with flagops.enable("matmul", **named) as handle:
                x @ x
                assert rows_of(handle) == {"aten::mm": ({"matmul/numba": 1}, {})}
        with flagops.using(backend="numpy"), flagops.enable() as handle:
            x @ x
            assert rows_of(handle) == {"aten::mm": ({"matmul/numpy": 1}, {})}


def test_training_is_a_row_of_its_own():
    q = torch.randn(1, 2, 5, 16, requires_grad=True)
    attention = "scaled_dot_product_attention"
    with order.forced(table(replace={attention: ("numba",), f"{attention}.training": ()})), flagops.enable() as handle:
        F.scaled_dot_product_attention(q, q, q).sum().backward()
        with torch.no_grad():
            F.scaled_dot_product_attention(q, q, q)
        replaced, passed = rows_of(handle)[f"aten::{attention}"]
    assert replaced == {f"{attention}/numba": 1}
    assert passed == {"torch's own kernel and its backward are faster for few rows, says a test": 1}


def _row(key, names):
    return json.dumps({"run": {key: names}, "replace": {}})


BAD = {
    "no file": (None, "No such file"),
    "no JSON": ("{", "is no table of `flagops tune`"),
    "another document": ("[]", "is no table of `flagops tune`"),
    "an unknown operator": (
        '{"run": {"matmull": ["numba"]}, "replace": {}}',
        "no operator 'matmull'; did you mean 'matmul'",
    ),
    "an unknown dtype": ('{"run": {"matmul.fp32": ["numba"]}, "replace": {}}', "'fp32' is none of"),
    "unknown rows": (
        '{"run": {"matmul.float32.several": ["numba"]}, "replace": {}}',
        "'several' is none of one, few, many",
    ),
    "no list": ('{"run": {"matmul": "numba"}, "replace": {}}', "expected a list of backends"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_table_is_refused_by_name(name, tmp_path):
    text, message = BAD[name]
    path = tmp_path / "order.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match="order") as error:
        order.read(path, f"FLAGOPS_ORDER={path}")
    assert message in str(error.value)


ASKED = "import torch, flagops; from flagops import order, machine; print(order.table(machine.cpu_kind()).words())"


def python(script, **environment):
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | environment, capture_output=True, text=True)
    return done.stdout + done.stderr


@pytest.mark.drawn
def test_a_table_of_this_machine_comes_before_the_shipped_one_while_it_is_true(tmp_path):
    made = {**order.identity(), "date": "2026-01-31"}
    own = order.tuned(KIND, str(tmp_path))
    own.write_text(tune.written(order.Table(KIND, {"*": ("torch",)}, {"*": ()}, made, "")))
    assert "flagops tune, made 2026-01-31" in python(ASKED, FLAGOPS_CACHE=str(tmp_path))
    named = tmp_path / "named.json"
    own.rename(named)
    assert f"FLAGOPS_ORDER={named}" in python(ASKED, FLAGOPS_CACHE=str(tmp_path), FLAGOPS_ORDER=str(named))
    own.write_text(tune.written(order.Table(KIND, {"*": ("torch",)}, {"*": ()}, made | {"torch": "1.0"}, "")))
    said = python(ASKED, FLAGOPS_CACHE=str(tmp_path))
    assert "flagops/orders/" in said
    assert "torch was '1.0'" in said
    assert "run `flagops tune` again" in said


def test_a_setting_of_the_process_is_not_one_of_a_block(tmp_path):
    with pytest.raises(ValueError, match="FLAGOPS_ORDER"), flagops.using(order=str(tmp_path)):
        pass


@pytest.fixture
def brief(monkeypatch):
    """Cases of no meaning and known times; whole models likewise."""
    measured = []

    def case(what, key, size, **times):
        found = tune_cases.Case(what, key, size, dict, measure.Settings())
        monkeypatch.setattr(tune_cases.Case, "measure", lambda self: measured.append(self.title) or TIMES[self.title])
        TIMES[found.title] = times
        return found

    TIMES = {}
    cases = [
        case("replace", "linear.float32.one", "small", **{tune_cases.TORCH: 4.0, "numba": 2.0}),
        case("replace", "linear.float32.one", "large", **{tune_cases.TORCH: 4.0, "numba": 4.0}),
        case("replace", "linear.float32.many", "small", **{tune_cases.TORCH: 4.0, "numba": 3.99}),
        case("replace", "matmul.float32.one", "small", **{tune_cases.TORCH: 4.0, "numba": 1.0}),
        case("run", "matmul.float32.one", "small", torch=2.0, numba=1.0),
        case("run", "matmul.float32.few", "small", torch=2.0, numba=3.0),
        case("run", "swiglu.float32.one", "small", torch=2.0, numba=1.0),
    ]
    monkeypatch.setattr(tune_cases, "cases", lambda *_: iter(cases))
    monkeypatch.setattr(tune_cases, "models", lambda device: iter(()))
    monkeypatch.setattr(tune_cases, "usable", lambda device: ["numba", "torch"])
    return measured


def test_the_command_writes_what_it_measured(brief, tmp_path, capsys):
    path = tmp_path / "order.json"
    assert tune.run(["--out", str(path)]) == 0
    found = order.read(path, "it")
    assert found.kind == KIND
    assert found.replaces("linear", "float32", "one") == ("numba",)
    assert found.replaces("linear", "float32", "many") == ()
    assert found.replaces("rms_norm", "float32", "one") == ()
    assert found.runs("matmul", "float32", "one")[0] == "numba"
    assert found.runs("matmul", "float32", "few")[0] == "torch"
    assert found.made["cpu"] == machine.cpu_model()
    assert f"FLAGOPS_ORDER={path}" in capsys.readouterr().out
    assert [*tmp_path.iterdir()] == [path]


def test_an_interrupted_run_goes_on(brief, tmp_path, monkeypatch):
    path = tmp_path / "order.json"
    real = tune_cases.Case.measure

    def interrupted(case):
        if len(brief) == 3:
            raise KeyboardInterrupt
        return real(case)

    monkeypatch.setattr(tune_cases.Case, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune.run(["--out", str(path)])
    monkeypatch.setattr(tune_cases.Case, "measure", real)
    assert tune.run(["--out", str(path)]) == 0
    assert len(brief) == len(set(brief)) == 7


def test_what_a_model_only_asks_for_is_known():
    """Its calls are left to torch, which takes time: the judgement of whole models must see the operator."""
    q = torch.randn(1, 2, 3, 8)
    model = tune_cases.Model("attention", lambda: lambda: F.scaled_dot_product_attention(q, q, q), "cpu")
    found = table(replace={"*": (), "scaled_dot_product_attention.float16": ("numba",), "rms_norm": ("numba",)})
    assert model.asked(found) == (set(), {"scaled_dot_product_attention"})


def test_the_calls_of_a_model_that_are_taken_are_known_by_key():
    x, w = torch.randn(3, 64), torch.randn(64, 64)

    def call():
        return x @ w, x[:1] @ w, x.bfloat16() @ w.bfloat16()

    model = tune_cases.Model("products", lambda: call, "cpu")
    found = table(replace={"*": (), "matmul": ("numba",), "matmul.float32.few": (), "rms_norm": ("numba",)})
    taken, operators = model.asked(found)
    assert taken == {"matmul.bfloat16.few", "matmul.float32.one"}
    assert operators == {"matmul"}


class Slowed:
    """A model whose time beside torch's is known: so many hundredths for each key or operator that is taken."""

    title = "slowed"

    def __init__(self, **hundredths):
        self.hundredths = {key.replace("__", "."): cost for key, cost in hundredths.items()}

    def asked(self, table):
        return {key for key in self.hundredths if table.replace.get(key)}, {"matmul"} & self.hundredths.keys()

    def ratios(self, tables, least, quick):
        taken = {name: [key for key in self.hundredths if table.replace.get(key)] for name, table in tables.items()}
        return {
            name: tune_cases.Ratio(1.0 - sum(self.hundredths[key] for key in keys) / 100, 0.001)
            for name, keys in taken.items()
        }


def test_what_slows_a_model_is_left_to_torch_by_key_and_by_operator_where_that_is_not_enough():
    keys = {"matmul.float32.one": ("numba",), "matmul.bfloat16.one": ("numba",), "rms_norm": ("numba",)}
    full = table(replace={"*": (), **keys})
    left, ratio = tune._held(full, Slowed(matmul__float32__one=8, matmul__bfloat16__one=-3), False)
    assert left.replace == {"*": (), **keys, "matmul.float32.one": ()}
    assert ratio.middle == 1.03
    left, ratio = tune._held(table(replace={"*": (), **keys, "matmul": ("numba",)}), Slowed(matmul=9), False)
    assert left.replace == {"*": (), "rms_norm": ("numba",), "matmul": ()}
    assert ratio.middle == 1.0
    left, ratio = tune._held(full, Slowed(rms_norm=-1), False)
    assert left == full


def test_models_are_held_again_to_a_table_that_a_later_one_changed(monkeypatch):
    full = table(replace={"*": (), "matmul.float32.one": ("numba",)})
    gains, loses = Slowed(matmul__float32__one=-20), Slowed(matmul__float32__one=20)
    gains.title = "gains"
    monkeypatch.setattr(tune_cases, "models", lambda device: iter([gains, loses]))
    left = tune._held_to_models(full, "cpu", False)
    assert left.replace == {"*": (), "matmul.float32.one": ()}
    assert {name: float(said.split()[0]) for name, said in left.made["models"].items()} == {"gains": 1, "slowed": 1}


def test_a_model_is_raced_with_every_table_at_once():
    x, w = torch.randn(4, 64), torch.randn(64, 64)
    model = tune_cases.Model("product", lambda: lambda: x @ w, "cpu")
    found = model.ratios({"one": table(), "other": table(replace={"*": ()})}, 0.97, quick=True)
    assert found.keys() == {"one", "other"}
    assert all(0 < ratio.middle < 100 and ratio.error >= 0 for ratio in found.values())


def test_a_ratio_is_less_only_where_that_is_shown():
    quiet = tune_cases.Ratio.of([1.0] * 7, [1.1, 1.1, 1.1, 1.11, 1.09, 1.1, 5.0])
    noisy = tune_cases.Ratio.of([1.0] * 7, [0.8, 1.1, 1.4, 0.9, 1.05, 1.3, 0.7])
    assert quiet.below(0.97)
    assert noisy.middle < 0.97
    assert not noisy.below(0.97)
    assert not tune_cases.Ratio.of([1.0] * 7, [0.9] * 7).below(0.97)


def test_what_loses_in_a_whole_model_is_given_back(brief, tmp_path, monkeypatch, capsys):
    class Losing:
        title = "a model"

        def asked(self, table):
            return set(), {op for op in ("linear", "matmul") if table.replaces_any(op)}

        def ratios(self, tables, least, quick):
            return {name: tune_cases.Ratio(0.8 if t.replaces_any("linear") else 1.1) for name, t in tables.items()}

    monkeypatch.setattr(tune_cases, "models", lambda device: iter([Losing()]))
    path = tmp_path / "order.json"
    assert tune.run(["--out", str(path)]) == 0
    found = order.read(path, "it")
    assert not found.replaces_any("linear")
    assert found.replaces_any("matmul")
    assert found.made["models"] == {"a model": "1.10 ± 0.00"}
    assert "linear is left to torch" in capsys.readouterr().out


@pytest.mark.parametrize(("ratio", "code"), [((1.2, 0.01), 0), ((0.95, 0.05), 0), ((0.9, 0.01), 1)])
def test_models_are_held_to_the_table_in_force(ratio, code, monkeypatch, capsys):
    class Measured:
        title = "a model"

        def ratios(self, tables, least, quick):
            return dict.fromkeys(tables, tune_cases.Ratio(*ratio))

    monkeypatch.setattr(tune_cases, "models", lambda device: iter([Measured()]))
    assert tune.run(["--check"]) == code
    assert ("a model" if code else "none") in capsys.readouterr().out.splitlines()[-1]


def test_a_case_is_measured_for_real():
    cases = tune_cases.cases(["numba", "torch"], "cpu", quick=True)
    small = next(case for case in cases if case.key == "rms_norm.float32.one")
    assert set(small.measure()) == {tune_cases.TORCH, "numba"}


def test_a_folder_that_cannot_be_written_is_said_before_the_work(brief, tmp_path, capsys):
    path = tmp_path / "a file"
    path.touch()
    with pytest.raises(SystemExit, match="2"):
        tune.run(["--out", str(path / "order.json")])
    assert "a file is no folder" in capsys.readouterr().err
    assert not brief


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [24, 4, 5])
def test_grouped_products_of_every_dtype_that_torch_takes(dtype, n):
    """Torch's shape function refuses what its kernel computes: neither may a model then end, nor its result change."""
    a, b = torch.randn(8, 16).to(dtype), torch.randn(2, 16, n).to(dtype)
    offsets = torch.tensor([3, 8], dtype=torch.int32)

    def outcome():
        try:
            return torch._grouped_mm(a, b, offs=offsets)
        except RuntimeError as error:
            return str(error)

    plain = outcome()
    for named in ({}, {"backend": "numba"}):
        with flagops.enable("all", **named):
            got = outcome()
        if isinstance(plain, str):
            assert got == plain
        else:
            assert got.stride() == plain.stride()
            exact = torch.cat([a[:3].double() @ b[0].double(), a[3:].double() @ b[1].double()])
            sums = torch.cat([a[:3].double().abs() @ b[0].double().abs(), a[3:].double().abs() @ b[1].double().abs()])
            rounding = torch.finfo(dtype).eps
            assert ((got.double() - exact).abs() <= rounding * exact.abs() + 17 * 2**-23 * sums).all()
