"""The real world around a `Peer`: libp2p, the disk, worker threads, the trainer process and the command line.

cli, flags, cluster                     commands;  console, events, event_words: what they say
process, start, run, ends               one node from start to exit
driver, tensor_work, workers            a peer's effects, performed
libp2p_transport                        links to other nodes
    introductions, hello, link              from a connection to a link
    streams, announcements, transport_guard frames, gossipsub, and the bounds around libp2p
    bulk, bulk_fetch                        bytes: served, and fetched from several at once
store, objects, directory               the log, the content and small files on the disk
trainer_process, trainer_main           the process that imports torch      (trainer_protocol, trainer_connection)
    local_training, model_state, inner_state, text_workload, workload_loading
document, status_socket, status_view    the status, for programs and for people     (remote_status: of another machine)
verify, log_replay, export              what lies in a directory, checked or copied out
"""
