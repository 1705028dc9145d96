"""The proof of `sd.apply` and `sd.verify`: the model with gates is compared with the original."""
