-- What the API clears.

-- name: forget_healed
WITH gone AS (
    DELETE FROM {schema}.rejects
    WHERE healed_at < $1 AND (mapping, key_hash) IN (
        SELECT mapping, key_hash FROM {schema}.rejects WHERE healed_at < $1 LIMIT 10000)
    RETURNING 1
)
SELECT count(*) FROM gone;
