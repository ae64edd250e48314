"""Experts: the external models pi_1 .. pi_m whose actions join the policy's (Eq 5).

An expert has a name, samples n texts for each state, and gives the log-density of an action, or
None if that is unknown (`Expert` in sampling.py). blocks/scripted.py has the scripted ones; those
here are models behind APIs. In the order to read:

    settings.py, roster.py                   which experts a run has, and their requests ahead of it
    api_expert.py, workers.py                a model behind an API as an expert: deadline, failures
    cache.py, cache_file.py, integrity.py    the cache of answers, its file, its signatures
    apis.py                                  models by name: addresses, keys, prompts, prices
    clients.py, openai_client.py, gemini_client.py, replies.py, refusals.py
                                             asking, and reading what comes back
    collect.py, estimate.py, collection.py, purse.py
                                             buying answers ahead of training, within a budget
    imitation.py                             SFT on their samples, all or the right ones
    answering.py                             an expert's predictions in an evaluation
"""
