"""Training on a Ray cluster (extra `cluster`): the same stages and files as on one machine.

    address         which cluster: auto, local:N, ray://HOST:PORT
    shared_stages   stages 1 and 2 with Ray Train, one process per device
    user_adapters   stage 3a by one actor per device, each with the multi-user trainer on its share of the users
    training        one seed: the shared stages, then the users

All machines must see the run folder and the data under the same paths.
"""
