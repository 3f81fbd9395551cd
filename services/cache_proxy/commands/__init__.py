"""The commands of `cache-proxy` besides `serve`. All but `infer` work on the cache without a proxy."""
