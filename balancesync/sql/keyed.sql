-- What live mode does beside `target.sql`, in a session whose tables stay: nothing here may cost in
-- proportion to the target, or change a catalog at each flush.

-- name: create_gone
CREATE TEMP TABLE {staging}_gone ({key_types});
CREATE INDEX ON {diff} (n);

-- name: diff_gone_keys
INSERT INTO {diff} (n, op, {keys}, {olds})
SELECT $1 + row_number() OVER (ORDER BY {t_keys}), 'd', {t_keys}, {t_values}
FROM {staging}_gone AS s JOIN {target} AS t ON {same_key} WHERE t.{synced_at} IS NOT NULL;

-- name: rows_of_gone
SELECT {key_texts} FROM (
    SELECT {s_keys} FROM {staging}_gone AS s WHERE EXISTS (SELECT FROM {target} AS t WHERE {same_key})
) AS g;

-- name: empty_gone
DELETE FROM {staging}_gone;

-- name: vacuum_gone
VACUUM {staging}_gone;
