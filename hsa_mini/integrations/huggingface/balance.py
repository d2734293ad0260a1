"""Training a mixture of experts with `Trainer`."""

from transformers import TrainerCallback

from hsa_mini.model.moe import MoE


class BalanceExperts(TrainerCallback):
    """Balances the load of the experts after every step, as the training of this project does:
    `Trainer(model, callbacks=[BalanceExperts()])`. `Trainer` alone lets a few experts win.

    rate: how far the bias of a router moves in a step (see `MoE.update_bias`).
    """

    def __init__(self, rate: float = 1e-3) -> None:
        self.rate = rate

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        for layer in _mixtures(model):
            layer.count_tokens()

    def on_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        for layer in _mixtures(model):
            layer.update_bias(self.rate)


def _mixtures(model) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]
