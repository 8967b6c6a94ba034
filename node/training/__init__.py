"""The model and the data: the trainer process, and what is done with tensors. Only the trainer process imports torch.

trainer_process, trainer_connection, trainer_protocol   the trainer as the node sees it, and what they say to each other
trainer_main, local_training                            the trainer from within
workload_loading, text_workload                         the user's class; the built-in one
model_state, inner_state, model_file                    a model's values, the inner optimizer's, and the file that people load
tensor_work, workers                                    the effects that handle tensors; sums and steps in worker threads
"""
