"""Whatever a chat template computes, it ends within hard limits, and what renders it is robust and leaves nothing behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from llm_infer.base.errors import RequestError
from llm_infer.text.template_process import Limits, StoppedError, TemplateProcess, TemplateProcesses

LOOP = "{% for i in range(99999) %}"


@pytest.fixture(scope="module")
def processes() -> Iterator[TemplateProcesses]:
    """Small limits, so that reaching them takes little time."""
    made = TemplateProcesses(2, Limits(cpu_seconds=0.15, wall_seconds=30, memory=1 << 28))
    yield made
    made.close()


def repeat(start: str, step: str, times: int = 99) -> str:
    return f"{{% set n = namespace(x={start}) %}}{{% for i in range({times}) %}}{{% set n.x = {step} %}}{{% endfor %}}"


NESTED = repeat("[1]", "[n.x, n.x]", 40)
ATTACKS = {
    "integer squaring": repeat("3", "n.x * n.x"),
    "power": "{{ 10 ** (10 ** 10) }}",
    "shift by powers": "{{ 2 ** 99999999 | string }}",
    "text doubling by ~": repeat("'x'", "n.x ~ n.x"),
    "text doubling by +": repeat("'x'", "n.x + n.x"),
    "repetition": "{{ 'x' * 10**9 }}",
    "list repetition": "{{ [0] * 10**9 }}",
    "nested lists to JSON": NESTED + "{{ n.x | tojson }}",
    "nested lists compared": NESTED + NESTED.replace("n.", "m.").replace(" n ", " m ") + "{{ n.x == m.x }}",
    "nested lists printed": NESTED + "{{ n.x | pprint }}",
    "nested lists shown": NESTED + "{{ n.x }}",
    "nested lists ordered": NESTED + NESTED.replace("n.", "m.").replace(" n ", " m ") + "{{ n.x < m.x }}",
    "sum of lists": "{{ ([range(9999) | list] * 9999) | sum(start=[]) | length }}",
    "translate": "{{ ('x' * 9999999).translate({120: 'y' * 9999}) | length }}",
    "width in %": "{{ '%999999999d' % 1 }}",
    "precision in %": "{{ '%.999999999f' % 1 }}",
    "width in the filter format": "{{ '%999999999d' | format(1) }}",
    "width in format": "{{ '{:999999999}'.format(1) }}",
    "ljust": "{{ 'x'.ljust(10**9) }}",
    "center": "{{ 'x' | center(10**9) }}",
    "indent": "{{ ('x\n' * 999999) | indent(99999) }}",
    "expandtabs": "{{ ('\t' * 99999).expandtabs(99999) | length }}",
    "replace": "{{ ('x' * 99999).replace('x', 'y' * 99999) | length }}",
    "the filter replace": "{{ ('x' * 99999) | replace('x', 'y' * 99999) | length }}",
    "join": "{{ (['y' * 99999] * 99999) | join('x') | length }}",
    "method join": "{{ ('y' * 99999).join(['x'] * 99999) | length }}",
    "sort": repeat("range(99999) | list", "n.x | sort(reverse=i % 2)"),
    "map": "{{ ([range(99999) | list] * 9999) | map('sort') | list | length }}",
    "slice": "{{ range(99999) | slice(10**9) | list | length }}",
    "batch": "{{ range(99999) | batch(10**9, 'x') | list | length }}",
    "wordwrap": "{{ ('x ' * 9999999) | wordwrap(1) | length }}",
    "loops": f"{LOOP}{LOOP}{{% endfor %}}{{% endfor %}}",
    "macro calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "output": f"{LOOP}{'x' * 1000}{{% endfor %}}",
    "output of expressions": f"{LOOP}{{{{ 'x' * 1000 }}}}{{% endfor %}}",
    "unique": "{{ ([range(9999) | list] * 9999) | map('unique') | map('list') | list | length }}",
    "group by": repeat("range(99999) | map('string') | list", "n.x | groupby(0) | map('last') | sum(start=[])"),
    "product of attributes": "{{ ('x' * 999).split('') }}" + LOOP + "{{ ('a,' * 99999).split(',') | last }}{% endfor %}",
    "constants folded at compile time": "{{ 'x' * 99999999 ~ 'x' * 99999999 ~ 'x' * 99999999 ~ 'x' * 99999999 }}",
    "deep source": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "many blocks": "{% if true %}" * 5000 + "{% endif %}" * 5000,
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_end_within_the_limits(processes: TemplateProcesses, name: str) -> None:
    start = time.perf_counter()
    try:
        assert len(processes.render(ATTACKS[name], {})) < 100_000  # one that is cheap after all
    except RequestError as error:
        assert str(error).startswith("the chat template ") and "\n" not in str(error) and len(str(error)) < 3000
    assert time.perf_counter() - start < 10
    assert processes.render("{{ a }}", {"a": "next"}) == "next"


@pytest.mark.parametrize(
    ("name", "limits", "message"),
    [
        ("integer squaring", Limits(cpu_seconds=0.25), "more than 0.25 s of processor time"),
        ("text doubling by ~", Limits(cpu_seconds=30, memory=1 << 27), "more than 128 MiB of memory"),
        ("output", Limits(cpu_seconds=30), "puts out more than 16777216 characters"),
    ],
)
def test_the_error_names_the_limit(name: str, limits: Limits, message: str) -> None:
    processes = TemplateProcesses(1, limits)
    with pytest.raises(RequestError, match=f"^the chat template was stopped: it .*{message}$"):
        processes.render(ATTACKS[name], {})
    processes.close()


def test_the_limit_on_time_counts_each_rendering_anew(processes: TemplateProcesses) -> None:
    some = "{% for i in range(99999) %}{% endfor %}"
    start = time.process_time()
    for _ in range(60):
        assert processes.render(some, {}) == ""
    assert time.process_time() - start < 5  # the work is done elsewhere


def random_expression(rng: random.Random, depth: int) -> str:
    if depth == 0:
        return rng.choice(
            ("n.x", "n.x", "3", "'x'", "[1]", "99999", "10**9", "range(99999)|list", "{'a': n.x}", "messages")
        )
    a, b = (random_expression(rng, rng.randrange(depth)) for _ in range(2))
    return rng.choice((
        f"({a} * {b})", f"({a} + {b})", f"({a} ~ {b})", f"({a} ** {b})", f"({a} == {b})", f"({a} % {b})", f"[{a}, {b}]",
        f"({a})|tojson", f"({a})|string", f"({a})|list", f"({a})|sort", f"({a})|join({b})", f"({a})|replace('x', {b})",
        f"({a})|sum(start={b})", f"({a})|pprint", f"({a})|center({b})", f"({a})|slice({b})|list", f"({a})|wordwrap({b})",
        f"({a})|map('string')|list", f"'%{rng.choice(('9', '999999999'))}d'|format({b})", f"({a})|indent({b})",
        f"('x' * 999).ljust({b})", f"({a})|batch({b})|list", f"({a})|length", f"({a})|unique|list", f"({a})|int",
        f"({a}).split({b})", f"({a}).translate({b})", f"dict(a={a}).items()|list", f"({a})[{b}:]",
    ))  # fmt: skip


def random_template(rng: random.Random) -> str:
    lines = [f"{{% set n = namespace(x={random_expression(rng, 1)}) %}}"]
    for _ in range(rng.randrange(1, 4)):
        step = f"{{% set n.x = {random_expression(rng, 3)} %}}"
        loops = rng.randrange(3)
        lines.append("{% for i in range(40) %}" * loops + step + "{% endfor %}" * loops)
    return "".join(lines) + f"{{{{ {random_expression(rng, 2)} }}}}"


def render_random(processes: TemplateProcesses, seeds: range) -> int:
    """Renders random templates; returns how many were stopped."""
    stopped = 0
    for seed in seeds:
        template = random_template(random.Random(seed))
        start = time.perf_counter()
        try:
            processes.render(template, {"messages": [{"role": "user", "content": "Hi"}]})
        except RequestError as error:
            assert "\n" not in str(error), template
            stopped += isinstance(error, StoppedError)
        assert time.perf_counter() - start < 10, template
    assert processes.render("{{ 1 }}", {}) == "1"
    return stopped


def test_random_templates(processes: TemplateProcesses) -> None:
    assert render_random(processes, range(60)) < 20


@pytest.mark.sweep
def test_many_random_templates(processes: TemplateProcesses) -> None:
    print(f"{render_random(processes, range(1000, 5000))} of 4000 stopped")


def test_a_slow_template_does_not_hold_up_others() -> None:
    processes = TemplateProcesses(2, Limits(cpu_seconds=1.0, memory=1 << 28))
    processes.render("", {})
    with ThreadPoolExecutor(8) as pool:
        slow = pool.submit(processes.render, ATTACKS["integer squaring"], {})
        texts = list(pool.map(lambda i: processes.render("{{ i }}{{ 'x' * 200000 }}", {"i": i}), range(100)))
        assert not slow.done()
        assert texts == [f"{i}{'x' * 200000}" for i in range(100)]
        with pytest.raises(StoppedError):
            slow.result()
    processes.close()


def test_an_idle_process_that_was_killed_is_replaced() -> None:
    processes = TemplateProcesses(1, Limits())
    processes.render("", {})
    os.kill(processes._idle[0].pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while processes._idle[0].alive and time.monotonic() < deadline:
        time.sleep(0.01)
    assert processes.render("{{ 1 }}", {}) == "1"
    processes.close()


def test_memory_is_watched_where_the_system_does_not_bound_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # The limit of its address space is so high here that only the look from outside ends it.
    process = TemplateProcess(Limits(cpu_seconds=20, memory=1 << 33), watch_memory=True)
    monkeypatch.setattr(process, "_limits", Limits(memory=1 << 27))
    with pytest.raises(StoppedError, match="more than 128 MiB of memory"):
        process.ask(
            b'["{% set x = 200000000 * [1] %}{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}", {}]'
        )
    process.close()


def test_an_interrupt_while_it_waits_leaves_no_answer_behind(processes: TemplateProcesses) -> None:
    processes.render("", {})
    timer = threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        processes.render(ATTACKS["integer squaring"], {})
    timer.join()
    assert processes.render("{{ 1 }}", {}) == "1"


def run(program: str) -> subprocess.CompletedProcess[str]:
    start = "import os, signal, sys, threading, time\nfrom llm_infer.text.template_process import PROCESSES as p\n"
    command = [sys.executable, "-W", "error", "-c", start + program]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, start_new_session=True, check=False)


def test_ctrl_c_goes_to_the_program_alone() -> None:
    found = run(
        "p.render('', {}); pid = p._idle[0].pid\n"
        "try:\n    os.killpg(0, signal.SIGINT); time.sleep(5)\nexcept KeyboardInterrupt: pass\n"
        "print(p.render('{{ 1 }}', {}), p._idle[0].pid == pid)"
    )
    assert (found.returncode, found.stdout, found.stderr) == (0, "1 True\n", "")


def test_the_end_of_the_program_ends_its_processes() -> None:
    found = run(
        "import atexit\natexit.register(lambda: print(p.render('{{ 2 }}', {})))\np.render('', {}); print(p._idle[0].pid)"
    )
    pid, shown = found.stdout.split()
    assert (found.returncode, shown, found.stderr) == (0, "2", "")
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_program_that_is_killed_leaves_no_process() -> None:
    found = run("p.render('', {}); print(p._idle[0].pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)")
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{int(found.stdout)}/stat") as file:
                if file.read().rsplit(")", 1)[1].split()[0] == "Z":
                    break  # ended: who adopted it has only to notice
        except FileNotFoundError:
            break
        time.sleep(0.02)
    else:
        pytest.fail("it still runs")


def test_a_forked_child_starts_its_own() -> None:
    found = run(
        "p.render('', {}); pid = p._idle[0].pid\n"
        "child = os.fork()\n"
        "shown = p.render('{{ 3 }}', {}), (p._idle[0].pid == pid) == (child != 0)\n"
        "if child: os.waitpid(child, 0)\n"
        "print(*shown)"
    )
    assert (found.returncode, found.stdout, found.stderr) == (0, "3 True\n3 True\n", "")


def test_neither_jax_nor_jinja_is_loaded() -> None:
    found = run("p.render('', {}); print({'jax', 'jinja2', 'numpy'} & set(sys.modules))")
    assert found.stdout == "set()\n", found.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_the_environment_stays_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_A_TEST", "x")
    process = TemplateProcess(Limits())
    assert process.ask(b'["{{ 1 }}", {}]') == ["text", "1"]
    with open(f"/proc/{process.pid}/environ", "rb") as file:
        assert b"SECRET" not in file.read()
    process.close()


def test_values_that_are_not_plain(processes: TemplateProcesses) -> None:
    with pytest.raises(RequestError, match="plain values, as JSON has them: found a object"):
        processes.render("", {"x": object()})
    deep: list = []
    deep.append(deep)
    with pytest.raises(RequestError, match="plain values"):
        processes.render("", {"x": deep})
    assert processes.render("{{ x }}|{{ y }}", {"x": "\ud800 é", "y": float("inf")}) == "\ud800 é|inf"
