"""The models of mlx-lm that are refused, each with its reason; docs/families.md lists them.

A reason is the rest of a sentence that begins with the model's name. Families that are run in part say which settings
they refuse themselves (``DecoderFamily.refusal``).
"""

from specstream_mlx.families.recurrent import RECURRENT

_STATE = "has layers that fold the past into one state, from which rejected tokens cannot be taken back"
_LATENT = "has latent attention, whose rows and positions are kept in another form than keys and values"
_OWN_POSITIONS = (
    "makes its rotary embedding inside attention, where rows of a tree cannot be given positions of their own"
)
_SHARED_ROWS = "has layers that attend to the keys and values of another layer, so a layer is more than its own rows"
_LOOPS = "runs its layers several times for a token, with caches of their own each time"

REFUSED: dict[str, str] = dict.fromkeys(RECURRENT, _STATE) | {
    "afm7": _SHARED_ROWS,
    "bitnet": "multiplies by Metal kernels alone, so that its tokens cannot be verified on other machines",
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "deepseek_v41": _LATENT,
    "deepseek_v41_text": _LATENT,
    "gemma3n": "has layers that take inputs made from the token itself, and layers that share keys and values",
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT,
    "iquestloopcoder": _LOOPS,
    "joyai_llm_flash": _LATENT,
    "kimi_k2": _LATENT,
    "kimi_k25": _LATENT,
    "kimi_vl": _LATENT,
    "llama4": "has layers with caches that drop their oldest chunks, from which rejected tokens cannot be taken back",
    "longcat_flash": _LATENT,
    "minimax_m3_vl": "has layers that choose the rows they see by an index of their own beside keys and values",
    "mistral4": _LATENT,
    "muse_spark": _OWN_POSITIONS,
    "nanbeige": _LOOPS,
    "nanochat": _OWN_POSITIONS,
    "nemotron-nas": "has layers without attention, which keep no rows",
    "olmo": "adds a mask to its scores that mlx-lm's own code no longer makes, so mlx-lm cannot run a prompt",
    "phi3small": "has block-sparse attention, which counts rows where a tree needs positions",
    "plamo3": "sees a token more in a prompt than in generation, so that its text depends on how the prompt is cut",
    "talkie": _OWN_POSITIONS,
    "youtu_llm": _LATENT,
}
