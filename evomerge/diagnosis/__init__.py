"""Diagnosis: what the weights of models say about a merge of them, before anything is paid for."""
