"""Tensors and texts on disk, in folders that are written as a whole and verified when read.

`tensors` writes tensors as a file, `weights` the weights of a model, `training_state` the state of
a training run, each in a folder of `hsa_mini.files.whole_folder`. Nothing is ever unpickled. This
package does not depend on the model: `HSAModel.save_pretrained` and `HSAModel.from_pretrained` call
it.
"""
