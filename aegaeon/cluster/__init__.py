"""Many machines: Ray places the processes of one server and starts them again; here nothing is
computed or served, and no other module of ours imports ray.

Actors, all detached, named, restarted by Ray (`max_restarts=-1`), in the namespace `aegaeon`:
`aegaeon-<domain>` is the controller. It looks twice a second at Ray's nodes, compares what they
are to have (plan.py, pure) with what they have, and starts, drains and forgets members; it keeps
the catalogue, and tells on the board what there is. `aegaeon-<domain>-<name>` is a member
(member.py): one instance or one proxy, tied to its node. `aegaeon serve --cluster` only starts the
controller and watches it; killed, it leaves all running, and run again finds it.

A member is a supervisor (supervisor.py) with one child: the very process that serves on one
machine, with PDEATHSIG to its owner, the supervisor's thread. So a crash of native code costs a
process and not the actor; the child's signals, GIL and memory are its own, nothing of Ray's is in
it; and who watches, buries, backs off and drains is the code of one node. The actor's end, however
it comes, is the child's: the raylet ends its actors when it dies, the actors die by themselves when
they lose it, the kernel then kills the children.

Memory stays a node's: the first member on a node makes its shared memory and writes the layout,
the others take shares of it, the last removes it (store/shares.py), or, where all of them were
killed, a process beside them does (janitor.py). KV never leaves by handle: only instances of one
node hand over to each other. Table, mailboxes, board and catalogue are in Redis,
which all must reach.

Models live on some nodes each, or on all where each has room for all (homes.py, by the policy of
scheduler/placement.py, which the simulator runs, too). The controller chooses from what proxies and
instances tell on the board (demands.py) when nodes or models come and go, and now and then
(placing.py); it writes that into the catalogue, which outlives it, and all follow: instances serve
what lives on their node, proxies send by the rows of who serves (scheduler/among.py). What leaves a
node does so once others serve it; what runs there ends there.

Weights come by themselves. Each node has a models directory, and a porter (porter.py), a process of
whichever of its members got there first (porters.py). It gives the node's models to the porters of
other nodes, which must know the cluster's secret, and has brought what the node lacks, from shared
directories, from all porters that have it, or from the hub (transfer/). The board tells where each
porter listens, what its node has, and what is on its way. The catalogue has of each model what
planning needs, and its directory's name; an instance sees only those of it whose files are there
(store/catalog_here.py), a proxy all: it needs a tokenizer, which its porter brings before weights.

What ends | what follows
--- | ---
an instance's process | its member starts it again (back-off); its requests move at once
a member's actor | Ray starts it again on its node; its row goes first; requests move
a porter | the member that owns it starts it again; if that member ended, another one does
a node | its instances are lost once they are silent to the controller and to Redis (lease_s / 4 and
some); the controller takes their rows out; requests move; a proxy's place moves; its models are
placed on other nodes, until which requests for what lived there alone wait
the controller | Ray starts it again; it finds the members by their names; serving goes on
`aegaeon serve` | serving goes on; run again it finds the controller
Ray's head | members elsewhere serve on for as long as their raylets live without it (60 s, by
RAY_gcs_rpc_server_reconnect_timeout_s; for good where Ray keeps its state in Redis); no restarts
Redis | as on one node: what is under way waits for it and goes on

A node that joins gets what its rule says; one that Ray drains is emptied: its instances take
nothing new, their requests end within drain_s or go on elsewhere, then they leave.
"""
