import subprocess
import sys


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['evomerge', '--help']\n"
        "from evomerge.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'torch', 'ray', 'lm_eval', 'optuna', 'transformers', 'cma', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    for command in ("run", "resume", "status", "front", "candidates", "export", "merge", "evaluate", "check"):
        assert f"\n  {command} " in done.stdout
