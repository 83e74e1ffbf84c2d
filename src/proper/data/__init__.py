"""Users' text: from files of interactions to histories and held-out queries.

Stands beside the layers and models and knows neither; what a token is comes in as a callable.
"""
