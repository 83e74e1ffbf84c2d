"""Training and serving on a Ray cluster (extra `cluster`): the same stages, files and HTTP routes as on one machine.

    address         which cluster: auto, local:N, ray://HOST:PORT
    shared_stages   stages 1 and 2 with Ray Train, one process per device
    user_adapters   stage 3a by one actor per device, each with the multi-user trainer on its share of the users
    training        one seed: the shared stages, then the users
    replica         a process with the run's model and an engine
    user_router     which replica answers a user
    serving         the engine of the HTTP server, which sends requests to replicas
    deployment      starts the replicas with Ray Serve

All machines must see the run folder and the data under the same paths.
"""
