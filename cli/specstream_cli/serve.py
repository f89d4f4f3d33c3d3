"""``specstream-mlx serve``: an OpenAI-compatible HTTP server that answers several requests at once."""

import ipaddress
import logging
import os
import re
import socket
from pathlib import Path
from typing import Annotated

import typer

from specstream_cli.terminal import quieten_libraries, to_stderr
from specstream_cli.validation import any_repo_id, utf8, within
from specstream_mlx.errors import InvalidInputError, UnsupportedError, UsageError
from specstream_mlx.options import DrafterName, DraftMode

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "kb": 10**3, "mb": 10**6, "gb": 10**9}
GRACE = 10  # seconds for running answers after SIGTERM


def _size(value: str) -> str:
    parse_size(value)
    return value


def parse_size(value: str) -> int:
    """Bytes, as 4000000, 500M or 8GB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", value.strip().lower())
    if found is None or found[2] not in _UNITS:
        raise typer.BadParameter(f"got {value!r}, expected bytes such as 500MB or 4GB")
    return int(float(found[1]) * _UNITS[found[2]])


def serve(
    model: Annotated[
        str | None,
        typer.Option(help="MLX model directory or Hugging Face repository; default: the model shipped here."),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            "--adapter-path",
            metavar="[NAME=]PLACE",
            help="An adapter; requests name it as their model. May be repeated; the first one answers by default.",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; beyond loopback an API key is demanded.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(callback=within(0, 65535), help="Port to listen on; 0 takes a free one.")] = 8080,
    api_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Environment variable that holds the API key.")
    ] = None,
    allowed_origins: Annotated[
        str | None, typer.Option(metavar="LIST", help="Origins of web pages that may ask, separated by commas.")
    ] = None,
    draft: Annotated[DraftMode, typer.Option(help="How to draft; every choice gives the same tokens.")] = "auto",
    drafter: Annotated[
        DrafterName | None, typer.Option(help="Who drafts; default: the streams where the model has them, else none.")
    ] = None,
    draft_model: Annotated[str | None, typer.Option(help="Second model of the drafter 'two-model'.")] = None,
    num_draft_tokens: Annotated[
        int | None, typer.Option(callback=within(1), help="How far ahead 'two-model' and 'prompt-lookup' guess.")
    ] = None,
    max_concurrency: Annotated[
        int, typer.Option(callback=within(1), help="Most answers that are made at once; more wait.")
    ] = 16,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-m", callback=within(1), help="Most tokens where a request does not say.")
    ] = 512,
    temp: Annotated[float, typer.Option(callback=within(0), help="Temperature where a request does not say.")] = 0.0,
    top_p: Annotated[float, typer.Option(callback=within(0, 1), help="Nucleus sampling where it does not say.")] = 1.0,
    top_k: Annotated[int, typer.Option(callback=within(0), help="Likeliest tokens where it does not say.")] = 0,
    min_p: Annotated[float, typer.Option(callback=within(0, 1), help="Least probability where it does not say.")] = 0.0,
    chat_template: Annotated[
        str | None, typer.Option(callback=utf8, help="A chat template in place of the tokenizer's.")
    ] = None,
    prefill_step_size: Annotated[
        int, typer.Option(callback=within(1), help="Prompt tokens run between two passes of the others.")
    ] = 512,
    prompt_cache_size: Annotated[int, typer.Option(callback=within(0), help="Most prompts kept for reuse.")] = 16,
    prompt_cache_bytes: Annotated[str, typer.Option(callback=_size, help="Most bytes of kept prompts.")] = "4GB",
    prompt_cache_dir: Annotated[
        Path | None, typer.Option(help="Directory in which kept prompts outlive the server.")
    ] = None,
    request_timeout: Annotated[
        float, typer.Option(callback=within(0, above=True), help="Most seconds that an answer may take.")
    ] = 600.0,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with a model.")
    ] = False,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "warning",
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and library warnings.")] = False,
) -> None:
    """Answer requests of OpenAI's clients, several at once."""
    if log_level.lower() not in ("debug", "info", "warning", "error"):
        raise UsageError(f"--log-level: got {log_level!r}, expected debug, info, warning or error")
    local = _is_loopback(host)
    api_key = _api_key(api_key_env, host, local)
    adapters = dict(_named(text) for text in adapter or [])
    if len(adapters) < len(adapter or []):
        raise UsageError("--adapter: two of one name; give each its own as NAME=PLACE")
    if prompt_cache_dir is not None:
        prompt_cache_dir = prompt_cache_dir.expanduser()
        prompt_cache_dir.mkdir(parents=True, exist_ok=True)
    places = {"--model": model, "--draft-model": draft_model} | {
        f"--adapter {name}": place for name, place in adapters.items()
    }
    quieten_libraries(offline=not any_repo_id(places), debug=debug)
    logging.basicConfig(level=log_level.upper(), format="%(levelname)s: %(message)s")
    try:
        import uvicorn  # noqa: F401

        from specstream_cli.http_server import run
        from specstream_mlx.serving.app import Surface, make_app
    except ImportError as error:
        raise UnsupportedError(
            f"serve: {error.name} is not installed; run pip install 'specstream-mlx[serve]'"
        ) from error
    from specstream_mlx.serving.jobs import SamplingWish
    from specstream_mlx.serving.scheduler import Scheduler, ServerSettings

    listener = _listen(host, port)
    scheduler = Scheduler(
        ServerSettings(
            model=model,
            adapters=adapters,
            drafter=drafter,
            draft_model=draft_model,
            num_draft_tokens=num_draft_tokens,
            draft=draft,
            trust_remote_code=trust_remote_code,
            max_concurrency=max_concurrency,
            prefill_step_size=prefill_step_size,
            cache_size=prompt_cache_size,
            cache_bytes=parse_size(prompt_cache_bytes),
            cache_directory=prompt_cache_dir,
            chat_template=chat_template,
            seconds=request_timeout,
        )
    )
    surface = Surface(
        defaults=SamplingWish(temperature=temp, top_p=top_p, top_k=top_k, min_p=min_p),
        max_tokens=max_tokens,
        api_key=api_key,
        local=local,
        origins=tuple(origin.strip() for origin in (allowed_origins or "").split(",") if origin.strip()),
    )
    try:
        scheduler.start()
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listener.getsockname()[1]}"
        run(
            make_app(scheduler, surface),
            listener,
            grace=GRACE,
            log_level=log_level,
            ready=lambda: to_stderr(f"listening on {address}"),
            abandon=scheduler.abandon,
        )
    finally:
        listener.close()
        scheduler.stop()


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _api_key(variable: str | None, host: str, local: bool) -> str | None:
    if variable is None:
        if not local:
            raise UsageError(f"--host: {host} can be reached by others; set an API key and name it with --api-key-env")
        return None
    key = os.environ.get(variable, "")
    if not key.strip():
        raise UsageError(f"--api-key-env: the environment variable {variable} is not set; put the API key into it")
    return key


def _named(text: str) -> tuple[str, str]:
    """The name and the place of an adapter."""
    name, equals, place = text.partition("=")
    if equals and name and place:
        return name, place
    return Path(text).name if Path(text).expanduser().is_dir() else text, text


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=256)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InvalidInputError(f"--port: cannot listen on {host}:{port} ({reason}); give another one") from error
