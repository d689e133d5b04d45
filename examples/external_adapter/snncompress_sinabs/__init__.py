"""The adapter ``sinabs``: models of sinabs ≥ 2.0, squeezed ([N·T, ...]) or not ([N, T, ...])."""

from contextlib import ExitStack, contextmanager

from snncompress.extend import Adapter, ModelError, hookimpl, patched, remove_along


class SinabsAdapter(Adapter):
    """Models whose neurons derive from sinabs' StatefulLayer.

    A model is squeezed where one of its layers is: its input is then [N·T, ...], else [N, T, ...]. ``timesteps`` = T
    repeats static samples, whatever batch size or number of timesteps the layers were built with. Recurrent layers are
    left out: sinabs 2.0.3 can't copy them.
    """

    framework = "sinabs"

    def is_neuron(self, module):
        return _is_stateful(module) and module.does_spike

    def stateful(self, model):
        return {name: layer for name, layer in model.named_modules() if _is_stateful(layer)}

    def reset(self, model):
        """States back to the empty tensors that a new layer has: they take the next input's shape, and start at 0."""
        for layer in self.stateful(model).values():
            for name, state in list(layer.named_buffers(recurse=False)):
                setattr(layer, name, state.detach().new_zeros(0))
            for leftover in ("firing_rate", "recordings"):
                vars(layer).pop(leftover, None)
        self.reset_memories(model)

    def run(self, model, x, timesteps):
        """The output of static samples is [T, N, ...], as the library has it."""
        if timesteps is None:
            return model(x)
        squeezed = [layer for layer in self.stateful(model).values() if hasattr(layer, "num_timesteps")]
        shape = len(x), 1 if "one_step" in vars(model) else timesteps
        x = x.unsqueeze(1).expand(*shape, *x.shape[1:])
        with ExitStack() as stack:
            for layer in squeezed:
                stack.enter_context(patched(layer, "batch_size", shape[0]))
                stack.enter_context(patched(layer, "num_timesteps", shape[1]))
            y = model(x.flatten(0, 1) if squeezed else x)
        if squeezed and len(y) == shape[0] * shape[1]:
            y = y.unflatten(0, shape)
        return y.transpose(0, 1) if y.dim() > 2 and y.shape[:2] == shape else y

    @contextmanager
    def identities(self, model, stand_in):
        """``run`` feeds one step; what comes in as it is counts as so many samples. Leaky integrators pass all on."""

        def forward(layer):
            standing_in = (lambda x: stand_in(layer, x)) if self.is_neuron(layer) else (lambda x: x * 1.0)
            if hasattr(layer, "num_timesteps"):
                return standing_in
            return lambda x: standing_in(x.flatten(0, 1)).unflatten(0, x.shape[:2])

        with ExitStack() as stack:
            stack.enter_context(patched(model, "one_step", True))
            for layer in self.stateful(model).values():
                stack.enter_context(patched(layer, "forward", forward(layer)))
            yield

    def observe(self, neuron, observer, *, membrane):
        """Spikes from a forward hook; Ũ by standing in for ``spike_fn``, which is called with Ũ once per step."""
        if membrane:
            tap = ExitStack()
            tap.enter_context(patched(neuron, "spike_fn", _Tap(neuron.spike_fn, observer)))
            return tap.close

        def hook(neuron, args, spikes):
            steps = spikes.reshape(len(neuron.v_mem), -1, *neuron.v_mem.shape[1:])
            observer(steps.transpose(0, 1), None)

        return neuron.register_forward_hook(hook).remove

    def remove_channels(self, neuron, indices, *, width, axis):
        """Time constants and thresholds along the channel axis."""
        if next(neuron.children(), None) is not None:
            raise ModelError(f"{type(neuron).__name__} holds layers of its own, so its channels stay")
        remove_along(neuron, indices, width=width, axis=axis)

    def states(self, neuron):
        """Its buffers, which sinabs keeps in state_dicts; empty tensors mean zeros."""
        states = dict(neuron.named_buffers(recurse=False))
        return {name: state if state.numel() else state.new_zeros(()) for name, state in states.items()}

    def set_states(self, neuron, states):
        for name, state in states.items():
            setattr(neuron, name, state if state.dim() else state.new_zeros(0))


class _Tap:
    """Shows (spikes, Ũ) of each step to the observer."""

    def __init__(self, spike_fn, observer):
        self.spike_fn, self.observer, self.required_states = spike_fn, observer, spike_fn.required_states

    def apply(self, v_mem, *rest):
        spikes = self.spike_fn.apply(v_mem, *rest)
        self.observer(spikes.detach().unsqueeze(0), v_mem.detach().unsqueeze(0))
        return spikes


def _is_stateful(module):  # by name, so that sinabs isn't imported for a model of another framework
    home = "sinabs.layers.stateful_layer"
    return any(cls.__module__ == home and cls.__name__ == "StatefulLayer" for cls in type(module).__mro__)


@hookimpl
def register_adapters(register):
    register(SinabsAdapter)
