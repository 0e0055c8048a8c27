-- What `status`, `health` and `check` ask beside balancesync's own tables.

-- name: writer
SELECT EXISTS (
    SELECT FROM pg_locks AS l
    WHERE l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted
        AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
        AND (l.classid::bigint << 32) | l.objid::bigint = $1);

-- name: role
SELECT current_user AS role,
    has_database_privilege(current_database(), 'CREATE') AS may_create_schema,
    has_database_privilege(current_database(), 'TEMPORARY') AS may_stage,
    to_regnamespace($1) IS NOT NULL AS has_schema,
    coalesce(has_schema_privilege(to_regnamespace($1), 'USAGE'), false) AS may_use_schema,
    coalesce(has_schema_privilege(to_regnamespace($1), 'CREATE'), false) AS may_create_in_schema,
    current_schema() AS default_schema,
    coalesce(has_schema_privilege(to_regnamespace(current_schema()), 'CREATE'), false)
        AS may_create_in_default,
    current_setting('fsync') = 'on' AS fsync,
    current_setting('synchronous_commit') AS synchronous_commit;

-- name: plpgsql
SELECT EXISTS (SELECT FROM pg_language WHERE lanname = 'plpgsql' AND has_language_privilege(oid, 'USAGE'));

-- name: own_tables
SELECT c.relname AS name
FROM pg_class AS c
WHERE c.relnamespace = to_regnamespace($1) AND c.relkind IN ('r', 'p') AND NOT (
    has_table_privilege(c.oid, 'SELECT') AND has_table_privilege(c.oid, 'INSERT')
    AND has_table_privilege(c.oid, 'UPDATE') AND has_table_privilege(c.oid, 'DELETE'))
ORDER BY c.relname;
