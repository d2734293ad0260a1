"""Tensors and texts on disk, in folders that are written as a whole and verified when read.

`folder` writes and verifies any folder, `weights` the weights of a model, `training_state` the
state of a training run. This package does not depend on the model: `HSAModel.save_pretrained` and
`HSAModel.from_pretrained` call it.
"""
