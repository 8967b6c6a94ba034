"""The network as the node sees it, and libp2p behind it. Read in this order:

addresses, known_addresses         where peers are reached, and where they were last seen
streams, hello                     frames on a stream; what two nodes say first, and the line that brings a joiner
link, introductions                a connection to a peer, and how one comes to be
transport_events, transport_guard  what a transport tells, its bounds, and those put around py-libp2p
announcements                      gossipsub, fenced in
libp2p_transport                   all of it: peers by id, messages, announcements, streams
bulk, bulk_fetch                   content served chunk by chunk, and fetched from several peers at once
question                           one question to one peer, before there is a `Peer`
rejections                         what was refused, and whose it was
"""
