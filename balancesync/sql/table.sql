-- What the catalogs know about a target table.

-- name: relation
SELECT c.oid::bigint AS oid, n.nspname AS schema, c.relname AS name, c.relkind::text AS kind,
       row_security_active(c.oid) AS hidden_rows,
       c.relkind = 'r' AND EXISTS (SELECT FROM pg_inherits WHERE inhparent = c.oid) AS has_children,
       has_table_privilege(c.oid, 'DELETE') AS may_delete, current_user AS role
FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE c.oid = to_regclass($1);

-- name: hidden
SELECT n.nspname AS schema, current_user AS role
FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE c.relname = $1 AND NOT has_schema_privilege(n.oid, 'USAGE')
    AND n.nspname = ANY (regexp_split_to_array(translate(current_setting('search_path'), '"', ''), ', *'))
LIMIT 1;

-- name: columns
SELECT a.attname AS name, format_type(a.atttypid, a.atttypmod) AS type, a.attnotnull AS not_null,
       a.atthasdef OR a.attidentity <> '' AS filled, a.attgenerated <> '' OR a.attidentity = 'a' AS generated,
       coalesce(l.collisdeterministic, true) AS deterministic,
       CASE WHEN l.oid IS NOT NULL THEN quote_ident(ln.nspname) || '.' || quote_ident(l.collname) END
           AS collation,
       has_column_privilege($1::oid, a.attnum, 'SELECT') AS may_select,
       has_column_privilege($1::oid, a.attnum, 'INSERT') AS may_insert,
       has_column_privilege($1::oid, a.attnum, 'UPDATE') AS may_update
FROM pg_attribute AS a
LEFT JOIN pg_collation AS l ON l.oid = a.attcollation
LEFT JOIN pg_namespace AS ln ON ln.oid = l.collnamespace
WHERE a.attrelid = $1::oid AND a.attnum > 0 AND NOT a.attisdropped
ORDER BY a.attnum;

-- name: unique_indexes
-- Under the columns' own collations: another one may hold different keys for equal.
SELECT (SELECT array_agg(a.attname::text)
        FROM unnest(i.indkey[0:i.indnkeyatts - 1]) AS k (attnum)
        LEFT JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = k.attnum) AS columns
FROM pg_index AS i
WHERE i.indrelid = $1::oid AND i.indisunique AND i.indisvalid AND i.indimmediate
      AND i.indpred IS NULL AND i.indexprs IS NULL
      AND NOT EXISTS (
          SELECT FROM unnest(i.indkey[0:i.indnkeyatts - 1], i.indcollation[0:i.indnkeyatts - 1])
              AS k (attnum, under)
          JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
          WHERE a.attcollation <> k.under);

-- name: hooks
-- Rules, and triggers, of partitions too, that may see to it that a row isn't written, or otherwise.
SELECT DISTINCT 'trigger' AS kind, t.tgname AS name, t.tgtype & 3 = 3 AS before_row,
    md5(pg_get_triggerdef(t.oid) || p.prosrc) AS digest
FROM pg_trigger AS t JOIN pg_proc AS p ON p.oid = t.tgfoid
WHERE (t.tgrelid = $1::oid OR t.tgrelid IN (SELECT relid FROM pg_partition_tree($1::oid::regclass)))
    AND NOT t.tgisinternal AND t.tgenabled <> 'D' AND t.tgtype & 28 <> 0
UNION ALL
SELECT 'rule', r.rulename, false, md5(pg_get_ruledef(r.oid))
FROM pg_rewrite AS r
WHERE r.ev_class = $1::oid AND r.ev_type IN ('2', '3', '4') AND r.ev_enabled <> 'D'
ORDER BY kind, name, digest;
