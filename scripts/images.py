"""Build the images, or test that the main job runs in them as it would in a cluster.

Uses podman or docker. `--base` replaces the base image of the Dockerfile.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import uuid
from importlib.metadata import version
from pathlib import Path

_ROOT = Path(__file__).parents[1]
_SERVICES = ("cache-proxy", "augmenter", "model-stub")
_SECURITY_FLAGS = (
    "--read-only",
    "--cap-drop",
    "all",
    "--security-opt",
    "no-new-privileges",
    "--user",
    "10001:10001",
)
_LINES = [
    {"company": "Acme", "title": "Senior Engineer"},
    {"company": "Acme", "title": "Intern"},
    {"company": "ACME ", "title": "senior engineer"},
]
_READY_SECONDS = 60


class ImageTestError(Exception):
    """A container did not run as expected."""


def main() -> int:
    """Return 1 if there is no engine, or an image does not do its work."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("build", "test"))
    parser.add_argument("--registry", default="", help="before every name, with a slash between")
    parser.add_argument("--tag", default="")
    parser.add_argument("--base", default="", help="base image: PYTHON_IMAGE of the Dockerfile")
    parser.add_argument("--build-args", default="", help="for the engine's build, parted by spaces")
    arguments = parser.parse_args()
    engine = _engine()
    if engine is None:
        print("Neither podman nor docker answers here (podman info, docker info): nothing was built.")
        return 1
    tag = arguments.tag or version("seniority-cache")
    prefix = f"{arguments.registry.rstrip('/')}/" if arguments.registry else ""
    names = {service: f"{prefix}{service}:{tag}" for service in _SERVICES}
    for service, name in names.items():
        _build(engine, service, name, tag=tag, base=arguments.base, more=arguments.build_args.split())
    if arguments.command == "test":
        try:
            _ImageTest(engine, names).run()
        except ImageTestError as failed:
            print(f"The images failed: {failed}")
            return 1
    return 0


def _engine() -> str | None:
    for engine in ("podman", "docker"):
        if (
            shutil.which(engine)
            and not subprocess.run([engine, "info"], capture_output=True, check=False).returncode
        ):
            return engine
    return None


def _build(engine: str, service: str, name: str, *, tag: str, base: str, more: list[str]) -> None:
    head = subprocess.run(
        [shutil.which("git") or "git", "rev-parse", "HEAD"],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    args = {"VERSION": tag, "REVISION": head.stdout.strip() or "unknown"} | (
        {"PYTHON_IMAGE": base} if base else {}
    )
    build_args = [part for key, value in args.items() for part in ("--build-arg", f"{key}={value}")]
    command = [
        engine,
        "build",
        "--quiet",
        "--file",
        "deploy/docker/Dockerfile",
        "--target",
        service,
        "--tag",
        name,
    ]
    subprocess.run([*command, *build_args, *more, "."], cwd=_ROOT, check=True)
    print(f"built {name}", flush=True)


class _ImageTest:
    """Runs stub, proxy and augmenter as containers, as in the demo."""

    def __init__(self, engine: str, names: dict[str, str]) -> None:
        self._engine = engine
        self._names = names
        self._suffix = uuid.uuid4().hex[:8]
        self._network = f"image-test-{self._suffix}"

    def run(self) -> None:
        """Run the test. Raises ImageTestError."""
        self._do("network", "create", self._network)
        try:
            with tempfile.TemporaryDirectory() as folder:
                self._serve("model-stub", "--listen", "0.0.0.0:50052")
                self._serve(
                    "cache-proxy",
                    "--model-target",
                    f"model-stub-{self._suffix}:50052",
                    "--cache-url",
                    "memory:",
                    "--drain-delay",
                    "0s",
                )
                self._augment(Path(folder))
                self._stop("cache-proxy")
        finally:
            for service in ("cache-proxy", "model-stub"):
                subprocess.run(
                    [self._engine, "rm", "--force", f"{service}-{self._suffix}"],
                    capture_output=True,
                    check=False,
                )
            subprocess.run([self._engine, "network", "rm", self._network], capture_output=True, check=False)

    def _serve(self, service: str, *args: str) -> None:
        name = f"{service}-{self._suffix}"
        self._do(
            "run",
            "--detach",
            "--name",
            name,
            "--network",
            self._network,
            *_SECURITY_FLAGS,
            self._names[service],
            "serve",
            *args,
        )
        logs = [self._engine, "logs", "--follow", name]
        with subprocess.Popen(logs, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as following:
            assert following.stdout is not None  # noqa: S101 - a pipe
            lines = []
            for line in following.stdout:
                lines.append(line)
                if '"ready"' in line:
                    break
            following.terminate()
        if not lines or '"ready"' not in lines[-1]:
            raise ImageTestError(f"{service} did not start: {''.join(lines)}")
        print(f"{service} runs, read-only, without capabilities, as 10001", flush=True)

    def _augment(self, folder: Path) -> None:
        raw, mod = folder / "raw", folder / "mod"
        raw.mkdir()
        mod.mkdir()
        folder.chmod(0o755)
        mod.chmod(0o777)
        (raw / "1714605540.jsonl").write_text(
            "".join(f"{json.dumps(line)}\n" for line in _LINES), encoding="utf-8"
        )
        self._do(
            "run",
            "--rm",
            "--network",
            self._network,
            *_SECURITY_FLAGS,
            "--volume",
            f"{raw}:/data/raw:ro",
            "--volume",
            f"{mod}:/data/mod",
            self._names["augmenter"],
            "run",
            "/data/raw",
            "/data/mod",
            "--target",
            f"cache-proxy-{self._suffix}:50051",
        )
        lines = (mod / "1714605540.jsonl").read_text(encoding="utf-8").splitlines()
        levels = [json.loads(line)["seniority"] for line in lines]
        if len(levels) != len(_LINES) or levels[0] != levels[2] or not set(levels) <= set(range(1, 8)):
            raise ImageTestError(f"these are no levels: {levels}")
        print(f"augmenter ran: levels {levels}", flush=True)

    def _stop(self, service: str) -> None:
        name = f"{service}-{self._suffix}"
        self._do("stop", "--time", str(_READY_SECONDS), name)
        code = self._do("inspect", "--format", "{{.State.ExitCode}}", name)
        if code != "0":
            raise ImageTestError(f"{service} ended with exit code {code} after its stop signal")
        print(f"{service} drained and ended with exit code 0", flush=True)

    def _do(self, *args: str) -> str:
        done = subprocess.run([self._engine, *args], capture_output=True, text=True, check=False)
        if done.returncode:
            raise ImageTestError(
                f"{self._engine} {' '.join(args[:3])}: {done.stderr.strip() or done.stdout.strip()}"
            )
        return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
