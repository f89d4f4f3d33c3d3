"""Breaks of adapters that come, go and take turns."""

from tests.breaks import Break

ADAPTERS = "tests/test_adapters.py::"
BREAKS = (
    Break(
        "something holds on to an unloaded adapter",
        "specstream_mlx/models/model.py",
        "        del self._shelf.resident[name]\n",
        "        self.__dict__.setdefault('_unloaded', []).append(self._shelf.resident.pop(name))\n",
        ADAPTERS + "test_memory_is_reported_and_given_back",
    ),
    Break(
        "a switch leaves layers of the adapter before in place",
        "specstream_mlx/models/adapters.py",
        "        put_layers(self._base, [(layer.path, layer.bare) for layer in self._in_place.layers])\n",
        "",
        ADAPTERS + "test_every_adapter_is_as_if_it_were_alone",
    ),
    Break(
        "an adapter is read for a base that another one is on",
        "specstream_mlx/models/model.py",
        "        with self._shelf.bare_base():\n",
        "        if True:\n",
        ADAPTERS + "test_every_adapter_is_as_if_it_were_alone",
    ),
    Break(
        "a LoRA that mlx-lm refuses stays in the base in part",
        "specstream_mlx/models/adapters.py",
        "        put_layers(base, [(layer.path, layer.bare) for layer in replaced()])\n",
        "        pass\n",
        ADAPTERS + "test_what_is_refused_leaves_the_model_as_it_was",
    ),
    Break(
        "the key of a calibration overlooks a LoRA",
        "specstream_mlx/planning/store.py",
        'name.rsplit(".", 1)[-1].startswith("lora_")',
        "False",
        ADAPTERS + "test_a_stored_calibration_belongs",
    ),
    Break(
        "a text goes on with another adapter",
        "specstream_mlx/engine/single.py",
        "                loop.check_adapter()\n",
        "",
        ADAPTERS + "test_a_switch_in_the_middle_of_a_text_is_refused",
    ),
)
