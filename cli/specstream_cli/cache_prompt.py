"""``specstream-mlx cache_prompt``: run a prompt once and keep its keys and values for ``--prompt-cache-file``."""

from pathlib import Path
from typing import Annotated

import typer

from specstream_cli.generate import generate, prompt_progress, read_prompt
from specstream_cli.options import of, place_of
from specstream_cli.signals import terminated_like_interrupted
from specstream_cli.terminal import progress_bar, quieten_libraries, to_stderr
from specstream_cli.validation import any_repo_id, utf8
from specstream_mlx.formats.chat_template import ChatTemplate
from specstream_mlx.formats.places import Repository, locate
from specstream_mlx.formats.prompts import prompt_ids, template_ids


@of(generate)
def cache_prompt(
    prompt_cache_file: Annotated[
        str, typer.Option(help="The file to write, ending in .safetensors; an earlier prompt cache is replaced.")
    ],
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", callback=utf8, help="The prompt to keep; '-' reads standard input.")
    ],
    model: str | None = None,
    adapter: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    ignore_chat_template: bool = False,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = 5000,
    prefill_step_size: int = 2048,
    quiet: bool = False,
    debug: bool = False,
) -> None:
    """Run a prompt and keep its cache in a file, which `generate` and mlx-lm go on from."""
    text = read_prompt(prompt)
    quieten_libraries(offline=not any_repo_id({"--model": model, "--adapter": adapter}, revision), debug=debug)
    from specstream_mlx import default_model_path, load
    from specstream_mlx.engine.generate import cache_tokens
    from specstream_mlx.target.caches import CacheGrowth
    from specstream_mlx.target.prompt_cache import REVISION, check_target, save_prompt_cache

    target_file = Path(prompt_cache_file).expanduser()
    check_target(target_file)
    growth = CacheGrowth(kv_bits, kv_group_size, quantized_kv_start)
    target, tokenizer = load(model, adapter=adapter, **place_of(revision, trust_remote_code))
    template = ChatTemplate(ignored=ignore_chat_template)
    given: str | list[int] = text
    if template.is_used(tokenizer):
        rendered = template.render(tokenizer, [{"role": "user", "content": text}], continued=True)
        given = template_ids(tokenizer, rendered)
    ids = prompt_ids(tokenizer, given, target.vocab_size)
    with terminated_like_interrupted():
        with progress_bar(quiet=quiet) as progress:
            report = prompt_progress(progress, prefill_step_size)
            caches = cache_tokens(target, ids, growth, prefill_step_size=prefill_step_size, progress=report)
        place = locate(model or str(default_model_path()), revision)
        metadata = {"model": str(place.name if isinstance(place, Repository) else place), "tokenizer_config": "{}"}
        if isinstance(place, Repository) and place.revision is not None:
            metadata[REVISION] = place.revision
        save_prompt_cache(target_file, caches, ids[:-1][:prefill_step_size], metadata)
    if not quiet:
        to_stderr(f"{target_file}: {len(ids)} tokens, {target_file.stat().st_size / 1e6:.1f} MB")
